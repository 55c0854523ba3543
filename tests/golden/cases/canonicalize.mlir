// PASSES: canonicalize
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %g: tensor<1x?x32xf32>, %u: tensor<1x?x32xf32>):
    %p = lb.permute %g {order = [0 : i64, 1 : i64, 2 : i64]} : (tensor<1x?x32xf32>) -> tensor<1x?x32xf32>
    %s = lb.silu %p : (tensor<1x?x32xf32>) -> tensor<1x?x32xf32> loc("mlp.act_fn")
    %y = lb.mul %s, %u : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> tensor<1x?x32xf32> loc("mlp")
    %dead = lb.silu %x : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32>
    lb.return %y : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>, %g: tensor<1x?x32xf32>, %u: tensor<1x?x32xf32>):
    %y = lb.silu_mul %g, %u : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> tensor<1x?x32xf32> loc("mlp")
    lb.return %y : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
