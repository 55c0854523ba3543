// PASSES: fold-affine
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x4xf32>):
    %g = lb.weight {names = ["norm.weight"]} : () -> tensor<4xf32>
    %n = lb.rms_norm %x, %g {eps = 1.000000e-06 : f64} : (tensor<1x?x4xf32>, tensor<4xf32>) -> tensor<1x?x4xf32> loc("norm")
    %s = lb.weight {names = ["smooth"]} : () -> tensor<4xf32>
    %m = lb.mul %n, %s : (tensor<1x?x4xf32>, tensor<4xf32>) -> tensor<1x?x4xf32>
    %wg = lb.weight {names = ["gate.weight"]} : () -> tensor<4x4xf32>
    %wu = lb.weight {names = ["up.weight"]} : () -> tensor<4x4xf32>
    %a = lb.linear %m, %wg : (tensor<1x?x4xf32>, tensor<4x4xf32>) -> tensor<1x?x4xf32> loc("gate")
    %b = lb.linear %m, %wu : (tensor<1x?x4xf32>, tensor<4x4xf32>) -> tensor<1x?x4xf32> loc("up")
    %h = lb.silu_mul %a, %b : (tensor<1x?x4xf32>, tensor<1x?x4xf32>) -> tensor<1x?x4xf32> loc("mlp")
    %p = lb.permute %h {order = [2 : i64, 0 : i64, 3 : i64, 1 : i64]} : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %r = lb.hadamard %p {block = #builtin.int<4>} : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %wd = lb.weight {names = ["down.weight"]} : () -> tensor<4x4xf32>
    %y = lb.linear %r, %wd : (tensor<1x?x4xf32>, tensor<4x4xf32>) -> tensor<1x?x4xf32> loc("down")
    lb.return %y : (tensor<1x?x4xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x4xf32>):
    %g = lb.weight {names = ["norm.weight"], edits = ["rows scale smooth"]} : () -> tensor<4xf32>
    %n = lb.rms_norm %x, %g {eps = 1.000000e-06 : f64} : (tensor<1x?x4xf32>, tensor<4xf32>) -> tensor<1x?x4xf32> loc("norm")
    %s = lb.weight {names = ["smooth"]} : () -> tensor<4xf32>
    %wg = lb.weight {names = ["gate.weight"], edits = ["rows order 2 0 3 1"]} : () -> tensor<4x4xf32>
    %wu = lb.weight {names = ["up.weight"], edits = ["rows order 2 0 3 1"]} : () -> tensor<4x4xf32>
    %a = lb.linear %n, %wg : (tensor<1x?x4xf32>, tensor<4x4xf32>) -> tensor<1x?x4xf32> loc("gate")
    %b = lb.linear %n, %wu : (tensor<1x?x4xf32>, tensor<4x4xf32>) -> tensor<1x?x4xf32> loc("up")
    %h = lb.silu_mul %a, %b : (tensor<1x?x4xf32>, tensor<1x?x4xf32>) -> tensor<1x?x4xf32> loc("mlp")
    %wd = lb.weight {names = ["down.weight"], edits = ["columns unrotate 4"]} : () -> tensor<4x4xf32>
    %y = lb.linear %h, %wd : (tensor<1x?x4xf32>, tensor<4x4xf32>) -> tensor<1x?x4xf32> loc("down")
    lb.return %y : (tensor<1x?x4xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
