// PASSES: fuse-siblings
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.attn.q_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.attn.q_proj")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.attn.q_proj")
    %b = lb.weight {names = ["l.attn.k_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.attn.k_proj")
    %yb = lb.linear %x, %b : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.attn.k_proj")
    %c = lb.weight {names = ["l.mlp.gate.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.mlp.gate")
    %yc = lb.linear %x, %c : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.mlp.gate")
    lb.return %ya, %yb, %yc : (tensor<1x?x32xf32>, tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %0 = lb.weight {names = ["l.attn.q_proj.weight", "l.attn.k_proj.weight"]} : () -> !lb.q<64x64, "int4.g32.sym"> loc("l.attn")
    %1 = lb.linear %x, %0 {segments = [#builtin.int<32>, #builtin.int<32>]} : (tensor<1x?x64xf32>, !lb.q<64x64, "int4.g32.sym">) -> tensor<1x?x64xf32> loc("l.attn")
    %ya, %yb = lb.split %1 : (tensor<1x?x64xf32>) -> (tensor<1x?x32xf32>, tensor<1x?x32xf32>) loc("l.attn")
    %c = lb.weight {names = ["l.mlp.gate.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.mlp.gate")
    %yc = lb.linear %x, %c : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.mlp.gate")
    lb.return %ya, %yb, %yc : (tensor<1x?x32xf32>, tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
