// PASSES: fuse-norm
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %g: tensor<64xf32>, %h: tensor<64xf32>, %d: tensor<32x64xf32>):
    %n = lb.rms_norm %x, %g {eps = 1.000000e-06 : f64} : (tensor<1x?x64xf32>, tensor<64xf32>) -> tensor<1x?x64xf32> loc("l.norm")
    %a = lb.weight {names = ["l.q.weight", "l.k.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l")
    %ya = lb.linear %n, %a {segments = [#builtin.int<32>, #builtin.int<32>]} : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x64xf32> loc("l")
    %o = lb.rms_norm %ya, %h {eps = 1.000000e-05 : f64} : (tensor<1x?x64xf32>, tensor<64xf32>) -> tensor<1x?x64xf32> loc("l.norm2")
    %b = lb.weight {names = ["l.up.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l.up")
    %yb = lb.linear %o, %b, %x {epilogue = ["residual"]} : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">, tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.up")
    %p = lb.rms_norm %yb, %h {eps = 1.000000e-05 : f64} : (tensor<1x?x64xf32>, tensor<64xf32>) -> tensor<1x?x64xf32> loc("l.norm3")
    %yc = lb.linear %p, %b : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x64xf32> loc("l.out")
    %yd = lb.linear %p, %d : (tensor<1x?x64xf32>, tensor<32x64xf32>) -> tensor<1x?x32xf32> loc("l.dense")
    lb.return %yc, %yd : (tensor<1x?x64xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %g: tensor<64xf32>, %h: tensor<64xf32>, %d: tensor<32x64xf32>):
    %a = lb.weight {names = ["l.q.weight", "l.k.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l")
    %ya = lb.linear %x, %a, %g {segments = [#builtin.int<32>, #builtin.int<32>], norm = 1.000000e-06 : f64} : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">, tensor<64xf32>) -> tensor<1x?x64xf32> loc("l")
    %b = lb.weight {names = ["l.up.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l.up")
    %yb = lb.linear %ya, %b, %x, %h {epilogue = ["residual"], norm = 1.000000e-05 : f64} : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">, tensor<1x?x64xf32>, tensor<64xf32>) -> tensor<1x?x64xf32> loc("l.up")
    %p = lb.rms_norm %yb, %h {eps = 1.000000e-05 : f64} : (tensor<1x?x64xf32>, tensor<64xf32>) -> tensor<1x?x64xf32> loc("l.norm3")
    %yc = lb.linear %p, %b : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x64xf32> loc("l.out")
    %yd = lb.linear %p, %d : (tensor<1x?x64xf32>, tensor<32x64xf32>) -> tensor<1x?x32xf32> loc("l.dense")
    lb.return %yc, %yd : (tensor<1x?x64xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
