// PASSES: fuse-requantize{target="sm_90"}
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xbf16>):
    %a = lb.weight {names = ["l.a.weight"]} : () -> !lb.q<96x64, "int4.g32.sym", "fragments"> loc("l.a")
    %b = lb.weight {names = ["l.b.weight"]} : () -> !lb.q<96x96, "int4.g32.sym", "fragments"> loc("l.b")
    %p = lb.weight {names = ["l.p.weight"]} : () -> !lb.q<96x96, "int4.g32.sym.perm", "fragments"> loc("l.p")
    %c = lb.weight {names = ["l.c.weight"]} : () -> !lb.q<96x96, "int4.g32.sym", "panel16"> loc("l.c")
    %token = lb.linear %x, %a : (tensor<1x?x64xbf16>, !lb.q<96x64, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l.a")
    %order = lb.linear %token, %b {activation = "int8.token"} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l.b")
    %rotated = lb.linear %order, %p {activation = "int8.g32", order = "0a1b"} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym.perm", "fragments">) -> tensor<1x?x96xbf16> loc("l.p")
    %panels = lb.linear %rotated, %b {activation = "int8.g32", rotate = #builtin.int<32>} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l.b")
    %two = lb.linear %panels, %c {activation = "int8.g32"} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym", "panel16">) -> tensor<1x?x96xbf16> loc("l.c")
    %y = lb.linear %two, %b {activation = "int8.g32"} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l.b")
    lb.return %y, %two : (tensor<1x?x96xbf16>, tensor<1x?x96xbf16>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xbf16>):
    %a = lb.weight {names = ["l.a.weight"]} : () -> !lb.q<96x64, "int4.g32.sym", "fragments"> loc("l.a")
    %b = lb.weight {names = ["l.b.weight"]} : () -> !lb.q<96x96, "int4.g32.sym", "fragments"> loc("l.b")
    %p = lb.weight {names = ["l.p.weight"]} : () -> !lb.q<96x96, "int4.g32.sym.perm", "fragments"> loc("l.p")
    %c = lb.weight {names = ["l.c.weight"]} : () -> !lb.q<96x96, "int4.g32.sym", "panel16"> loc("l.c")
    %token = lb.linear %x, %a : (tensor<1x?x64xbf16>, !lb.q<96x64, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l.a")
    %order = lb.linear %token, %b {activation = "int8.token"} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l.b")
    %rotated = lb.linear %order, %p {activation = "int8.g32", order = "0a1b"} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym.perm", "fragments">) -> tensor<1x?x96xbf16> loc("l.p")
    %panels = lb.linear %rotated, %b {activation = "int8.g32", rotate = #builtin.int<32>} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l.b")
    %two = lb.linear %panels, %c {activation = "int8.g32"} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym", "panel16">) -> tensor<1x?x96xbf16> loc("l.c")
    %y = lb.linear %two, %b {activation = "int8.g32"} : (tensor<1x?x96xbf16>, !lb.q<96x96, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l.b")
    lb.return %y, %two : (tensor<1x?x96xbf16>, tensor<1x?x96xbf16>) -> ()
  }) {sym_name = "m"} : () -> ()
}
