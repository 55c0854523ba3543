// PASSES: choose-layout{target="sm_90"}
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.q_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.q_proj")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.q_proj")
    lb.return %ya : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.q_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym", "fragments"> loc("l.q_proj")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym", "fragments">) -> tensor<1x?x32xf32> loc("l.q_proj")
    lb.return %ya : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
