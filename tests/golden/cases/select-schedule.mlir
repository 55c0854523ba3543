// PASSES: lower-kernels,select-schedule{max_tokens=2 target="ref"}
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.0.q.weight"]} : () -> !lb.q<32x64, "int4.g32.sym", "panel16"> loc("l.0.q")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym", "panel16">) -> tensor<1x?x32xf32> loc("l.0.q")
    lb.return %ya : (tensor<1x?x32xf32>) -> ()
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
  ^bb0(%10: tensor<?x64xf32>, %11: !lb.q<32x64, "int4.g32.sym">):
    %12 = "lbk.quantize"(%10) {limbs = #builtin.int<2>} : (tensor<?x64xf32>) -> tensor<?x64xf32>
    %13 = "lbk.mma"(%12, %11) : (tensor<?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<?x32xf32>
    "lbk.yield"(%13) : (tensor<?x32xf32>) -> ()
  }) {sym_name = "k_44c0cadc99169737", spec = {segments = [32 : i64], k = 64 : i64, format = "int4.g32.sym", layout = "n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32", compute = "int16", x_dtype = "f32", out_dtype = "f32", epilogue = []}, schedule = {m1 = "reference tile_m=1 tile_n=16 tile_k=128 warps=4 stages=2 split_k=1", m2 = "reference tile_m=1 tile_n=16 tile_k=128 warps=4 stages=2 split_k=1"}} : () -> ()
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.0.q.weight"]} : () -> !lb.q<32x64, "int4.g32.sym", "panel16"> loc("l.0.q")
    %ya = lb.call %x, %a {kernel = @k_44c0cadc99169737} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym", "panel16">) -> tensor<1x?x32xf32> loc("l.0.q")
    lb.return %ya : (tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
