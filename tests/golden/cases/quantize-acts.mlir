// PASSES: quantize-acts
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.attn.q_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym.perm"> loc("l.attn.q_proj")
    %ya = lb.linear %x, %a {input = {activation = "int4.g32.w1.static", rotate = #builtin.int<16>, order = "0a1b", scales = "2c3d"}} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym.perm">) -> tensor<1x?x32xf32> loc("l.attn.q_proj")
    %b = lb.weight {names = ["l.attn.k_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym.perm"> loc("l.attn.k_proj")
    %yb = lb.linear %x, %b {input = {activation = "int4.g32.w1.static", rotate = #builtin.int<16>, order = "0a1b", scales = "2c3d"}} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym.perm">) -> tensor<1x?x32xf32> loc("l.attn.k_proj")
    %c = lb.weight {names = ["l.attn.v_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.attn.v_proj")
    %yc = lb.linear %x, %c {input = {activation = "int8.token"}} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.attn.v_proj")
    lb.return %ya, %yb, %yc : (tensor<1x?x32xf32>, tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.attn.q_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym.perm"> loc("l.attn.q_proj")
    %0 = lb.hadamard %x {block = #builtin.int<16>} : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.attn.q_proj")
    %1 = lb.quantize %0 {format = "int4.g32.w1.static", order = "0a1b", scales = "2c3d"} : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.attn.q_proj")
    %ya = lb.linear %1, %a {order = "0a1b"} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym.perm">) -> tensor<1x?x32xf32> loc("l.attn.q_proj")
    %b = lb.weight {names = ["l.attn.k_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym.perm"> loc("l.attn.k_proj")
    %yb = lb.linear %1, %b {order = "0a1b"} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym.perm">) -> tensor<1x?x32xf32> loc("l.attn.k_proj")
    %c = lb.weight {names = ["l.attn.v_proj.weight"]} : () -> !lb.q<32x64, "int4.g32.sym"> loc("l.attn.v_proj")
    %2 = lb.quantize %x {format = "int8.token"} : (tensor<1x?x64xf32>) -> tensor<1x?x64xf32> loc("l.attn.v_proj")
    %yc = lb.linear %2, %c : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<1x?x32xf32> loc("l.attn.v_proj")
    lb.return %ya, %yb, %yc : (tensor<1x?x32xf32>, tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
