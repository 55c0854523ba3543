// PASSES: fuse-requantize{target="sm_90"},lower-kernels{compute="float"}
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xbf16>):
    %g = lb.weight {names = ["l.gate.weight", "l.up.weight"]} : () -> !lb.q<192x64, "int4.g32.sym", "fragments"> loc("l")
    %h = lb.linear %x, %g {segments = [#builtin.int<96>, #builtin.int<96>], epilogue = ["silu_mul"], activation = "int8.token"} : (tensor<1x?x64xbf16>, !lb.q<192x64, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l")
    %d = lb.weight {names = ["l.down.weight"]} : () -> !lb.q<64x96, "int4.g32.sym", "fragments"> loc("l.down")
    %y = lb.linear %h, %d {activation = "int8.g32"} : (tensor<1x?x96xbf16>, !lb.q<64x96, "int4.g32.sym", "fragments">) -> tensor<1x?x64xbf16> loc("l.down")
    lb.return %y : (tensor<1x?x64xbf16>) -> ()
  }) {sym_name = "m"} : () -> ()
}
// -----
builtin.module {
  "lbk.kernel"() ({
  ^bb0(%0: i32, %1: i32, %2: f32):
    "lbk.arg"(%0) {label = "w0"} : (i32) -> ()
    "lbk.arg"(%1) {label = "s0"} : (i32) -> ()
    "lbk.arg"(%2) {label = "scale"} : (f32) -> ()
    %3 = "lbk.shr"(%0, %1) : (i32, i32) -> i32
    %4 = "lbk.int"() {value = #builtin.int<15>} : () -> i32
    %5 = "lbk.and"(%3, %4) : (i32, i32) -> i32
    %6 = "lbk.int_to_float"(%5) : (i32) -> f32
    %7 = "lbk.const"() {value = -8.000000e+00 : f32} : () -> f32
    %8 = "lbk.add"(%6, %7) : (f32, f32) -> f32
    %9 = "lbk.mul"(%8, %2) : (f32, f32) -> f32
    "lbk.yield"(%9) : (f32) -> ()
  }, {
  ^bb0(%10: tensor<?x96xf32>, %11: !lb.q<64x96, "int4.g32.sym">):
    %12 = "lbk.mma"(%10, %11) : (tensor<?x96xf32>, !lb.q<64x96, "int4.g32.sym">) -> tensor<?x64xf32>
    "lbk.yield"(%12) : (tensor<?x64xf32>) -> ()
  }) {sym_name = "k_a42ff631afbe96b7", spec = {segments = [64 : i64], k = 96 : i64, format = "int4.g32.sym", layout = "n=p.w4.h2.g8 k=b.s2.q2.c2.t4.e2 mem=p.b.w.g.t.s.q.h pack=e.c/32 block=64 side=g.w.h", compute = "int8", x_dtype = "rounded", out_dtype = "bf16", epilogue = [], activation = "int8.g32"}} : () -> ()
  "lbk.kernel"() ({
  ^bb0(%0: i32, %1: i32, %2: f32):
    "lbk.arg"(%0) {label = "w0"} : (i32) -> ()
    "lbk.arg"(%1) {label = "s0"} : (i32) -> ()
    "lbk.arg"(%2) {label = "scale"} : (f32) -> ()
    %3 = "lbk.shr"(%0, %1) : (i32, i32) -> i32
    %4 = "lbk.int"() {value = #builtin.int<15>} : () -> i32
    %5 = "lbk.and"(%3, %4) : (i32, i32) -> i32
    %6 = "lbk.int_to_float"(%5) : (i32) -> f32
    %7 = "lbk.const"() {value = -8.000000e+00 : f32} : () -> f32
    %8 = "lbk.add"(%6, %7) : (f32, f32) -> f32
    %9 = "lbk.mul"(%8, %2) : (f32, f32) -> f32
    "lbk.yield"(%9) : (f32) -> ()
  }, {
  ^bb0(%10: tensor<?x64xf32>, %11: !lb.q<192x64, "int4.g32.sym">):
    %12 = "lbk.quantize"(%10) {limbs = #builtin.int<1>, format = "int8.token"} : (tensor<?x64xf32>) -> tensor<?x64xf32>
    %13 = "lbk.mma"(%12, %11) : (tensor<?x64xf32>, !lb.q<192x64, "int4.g32.sym">) -> tensor<?x192xf32>
    %14 = "lbk.silu_mul"(%13) : (tensor<?x192xf32>) -> tensor<?x96xf32>
    %15 = "lbk.quantize"(%14) {limbs = #builtin.int<1>, format = "int8.g32"} : (tensor<?x96xf32>) -> tensor<?x96xf32>
    "lbk.yield"(%15) : (tensor<?x96xf32>) -> ()
  }) {sym_name = "k_9fa025ba9c9ac888", spec = {segments = [96 : i64, 96 : i64], k = 64 : i64, format = "int4.g32.sym", layout = "n=p.w4.h2.g8 k=b.s2.q2.c2.t4.e2 mem=p.b.w.g.t.s.q.h pack=e.c/32 block=64 side=g.w.h", compute = "int8", x_dtype = "f32", out_dtype = "f32", epilogue = ["silu_mul"], activation = "int8.token", out_activation = "int8.g32"}} : () -> ()
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xbf16>):
    %g = lb.weight {names = ["l.gate.weight", "l.up.weight"]} : () -> !lb.q<192x64, "int4.g32.sym", "fragments"> loc("l")
    %h = lb.call %x, %g {kernel = @k_9fa025ba9c9ac888} : (tensor<1x?x64xbf16>, !lb.q<192x64, "int4.g32.sym", "fragments">) -> tensor<1x?x96xbf16> loc("l")
    %d = lb.weight {names = ["l.down.weight"]} : () -> !lb.q<64x96, "int4.g32.sym", "fragments"> loc("l.down")
    %y = lb.call %h, %d {kernel = @k_a42ff631afbe96b7} : (tensor<1x?x96xbf16>, !lb.q<64x96, "int4.g32.sym", "fragments">) -> tensor<1x?x64xbf16> loc("l.down")
    lb.return %y : (tensor<1x?x64xbf16>) -> ()
  }) {sym_name = "m"} : () -> ()
}
