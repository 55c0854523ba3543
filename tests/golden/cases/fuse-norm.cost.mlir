// PASSES: fuse-norm{call=0.0}
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %g: tensor<64xf32>):
    %n = lb.rms_norm %x, %g {eps = 1.000000e-06 : f64} : (tensor<1x?x64xf32>, tensor<64xf32>) -> tensor<1x?x64xf32> loc("l.norm")
    %a = lb.weight {names = ["l.q.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l.q")
    %ya = lb.linear %n, %a : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x64xf32> loc("l.q")
    %b = lb.weight {names = ["l.k.weight"]} : () -> !lb.q<64x64, "int3.g32.sym"> loc("l.k")
    %yb = lb.linear %n, %b : (tensor<1x?x64xf32>, !lb.q<64x64, "int3.g32.sym">) -> tensor<1x?x64xf32> loc("l.k")
    lb.return %ya, %yb : (tensor<1x?x64xf32>, tensor<1x?x64xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %g: tensor<64xf32>):
    %n = lb.rms_norm %x, %g {eps = 1.000000e-06 : f64} : (tensor<1x?x64xf32>, tensor<64xf32>) -> tensor<1x?x64xf32> loc("l.norm")
    %a = lb.weight {names = ["l.q.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l.q")
    %ya = lb.linear %n, %a : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x64xf32> loc("l.q")
    %b = lb.weight {names = ["l.k.weight"]} : () -> !lb.q<64x64, "int3.g32.sym"> loc("l.k")
    %yb = lb.linear %n, %b : (tensor<1x?x64xf32>, !lb.q<64x64, "int3.g32.sym">) -> tensor<1x?x64xf32> loc("l.k")
    lb.return %ya, %yb : (tensor<1x?x64xf32>, tensor<1x?x64xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
