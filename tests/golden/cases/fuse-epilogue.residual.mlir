// PASSES: fuse-epilogue
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %r: tensor<1x?x32xf32>):
    %a = lb.weight {names = ["l.o_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.o_proj")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.o_proj")
    %z = lb.add %r, %ya : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> tensor<1x?x32xf32> loc("l")
    lb.return %z : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %r: tensor<1x?x32xf32>):
    %a = lb.weight {names = ["l.o_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.o_proj")
    %z = lb.linear %x, %a, %r {epilogue = ["residual"]} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">, tensor<1x?x32xf32>) -> tensor<1x?x32xf32> loc("l.o_proj")
    lb.return %z : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
