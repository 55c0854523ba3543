// PASSES: assign-formats{scheme="w4a16" format="int3.g32.asym"}
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.q_proj.weight"]} : () -> tensor<32x64xf32> loc("l.q_proj")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, tensor<32x64xf32>) -> tensor<1x?x32xf32> loc("l.q_proj")
    %b = lb.weight {names = ["lm_head.weight"]} : () -> tensor<32x64xf32> loc("lm_head")
    %yb = lb.linear %x, %b : (tensor<1x?x64xf32>, tensor<32x64xf32>) -> tensor<1x?x32xf32> loc("lm_head")
    lb.return %ya, %yb : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.q_proj.weight"], reason = "scheme w4a16+int3.g32.asym"} : () -> !lb.q<32x64, "int3.g32.asym"> loc("l.q_proj")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, !lb.q<32x64, "int3.g32.asym">) -> tensor<1x?x32xf32> loc("l.q_proj")
    %b = lb.weight {names = ["lm_head.weight"], reason = "kept: excluded by scheme w4a16+int3.g32.asym"} : () -> tensor<32x64xf32> loc("lm_head")
    %yb = lb.linear %x, %b : (tensor<1x?x64xf32>, tensor<32x64xf32>) -> tensor<1x?x32xf32> loc("lm_head")
    lb.return %ya, %yb : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
