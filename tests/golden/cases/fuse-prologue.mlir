// PASSES: fuse-prologue
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %d: tensor<32x64xf32>):
    %r = lb.hadamard %x {block = #builtin.int<16>} : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.q")
    %q = lb.quantize %r {format = "int8.token"} : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.q")
    %a = lb.weight {names = ["l.q.weight", "l.k.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l")
    %ya = lb.linear %q, %a {segments = [#builtin.int<32>, #builtin.int<32>]} : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x64xf32> loc("l")
    %yd = lb.linear %q, %d : (tensor<1x?x64xf32>, tensor<32x64xf32>) -> tensor<1x?x32xf32> loc("l.dense")
    %p = lb.quantize %ya {format = "int4.g32.static", order = "0a1b", scales = "2c3d"} : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.o")
    %b = lb.weight {names = ["l.o.weight"]} : () -> !lb.q<32x64, "int4.g32.sym.perm"> loc("l.o")
    %yb = lb.linear %p, %b {order = "0a1b"} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym.perm">) -> tensor<1x?x32xf32> loc("l.o")
    lb.return %yb, %yd : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %d: tensor<32x64xf32>):
    %r = lb.hadamard %x {block = #builtin.int<16>} : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.q")
    %q = lb.quantize %r {format = "int8.token"} : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.q")
    %a = lb.weight {names = ["l.q.weight", "l.k.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l")
    %ya = lb.linear %x, %a {segments = [#builtin.int<32>, #builtin.int<32>], activation = "int8.token", rotate = #builtin.int<16>} : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x64xf32> loc("l")
    %yd = lb.linear %q, %d : (tensor<1x?x64xf32>, tensor<32x64xf32>) -> tensor<1x?x32xf32> loc("l.dense")
    %b = lb.weight {names = ["l.o.weight"]} : () -> !lb.q<32x64, "int4.g32.sym.perm"> loc("l.o")
    %yb = lb.linear %ya, %b {order = "0a1b", activation = "int4.g32.static", scales = "2c3d"} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym.perm">) -> tensor<1x?x32xf32> loc("l.o")
    lb.return %yb, %yd : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
