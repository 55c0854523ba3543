// PASSES: fuse-siblings,fuse-epilogue
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.mlp.gate.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.mlp.gate")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.mlp.gate")
    %b = lb.weight {names = ["l.mlp.up.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.mlp.up")
    %yb = lb.linear %x, %b : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.mlp.up")
    %y = lb.silu_mul %ya, %yb : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> tensor<1x?x32xf32> loc("l.mlp")
    lb.return %y : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %0 = lb.weight {names = ["l.mlp.gate.weight", "l.mlp.up.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l.mlp")
    %y = lb.linear %x, %0 {segments = [#builtin.int<32>, #builtin.int<32>], epilogue = ["silu_mul"]} : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.mlp")
    lb.return %y : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
