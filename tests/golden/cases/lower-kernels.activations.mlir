// PASSES: quantize-acts,fuse-siblings,fuse-prologue,choose-layout{target="cpu-avx512vnni"},lower-kernels
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.q.weight"]} : () -> !lb.q<32x64, "int8.ch.sym"> loc("l.q")
    %ya = lb.linear %x, %a {input = {activation = "int8.token", rotate = #builtin.int<64>}} : (tensor<1x?x64xf32>, !lb.q<32x64, "int8.ch.sym">) -> tensor<1x?x32xf32> loc("l.q")
    %b = lb.weight {names = ["l.k.weight"]} : () -> !lb.q<16x64, "int8.ch.sym"> loc("l.k")
    %yb = lb.linear %x, %b {input = {activation = "int8.token", rotate = #builtin.int<64>}} : (tensor<1x?x64xf32>, !lb.q<16x64, "int8.ch.sym">) -> tensor<1x?x16xf32> loc("l.k")
    lb.return %ya, %yb : (tensor<1x?x32xf32>, tensor<1x?x16xf32>) -> ()
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
    %4 = "lbk.int"() {value = #builtin.int<255>} : () -> i32
    %5 = "lbk.and"(%3, %4) : (i32, i32) -> i32
    %6 = "lbk.int_to_float"(%5) : (i32) -> f32
    %7 = "lbk.const"() {value = -1.280000e+02 : f32} : () -> f32
    %8 = "lbk.add"(%6, %7) : (f32, f32) -> f32
    %9 = "lbk.mul"(%8, %2) : (f32, f32) -> f32
    "lbk.yield"(%9) : (f32) -> ()
  }, {
  ^bb0(%10: tensor<?x64xf32>, %11: !lb.q<48x64, "int8.ch.sym">):
    %12 = "lbk.hadamard"(%10) {block = #builtin.int<64>} : (tensor<?x64xf32>) -> tensor<?x64xf32>
    %13 = "lbk.quantize"(%12) {limbs = #builtin.int<1>, format = "int8.token"} : (tensor<?x64xf32>) -> tensor<?x64xf32>
    %14 = "lbk.mma"(%13, %11) : (tensor<?x64xf32>, !lb.q<48x64, "int8.ch.sym">) -> tensor<?x48xf32>
    "lbk.yield"(%14) : (tensor<?x48xf32>) -> ()
  }) {sym_name = "k_f3cc1744a356ed90", spec = {segments = [32 : i64, 16 : i64], k = 64 : i64, format = "int8.ch.sym", layout = "n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32", compute = "int8", x_dtype = "f32", out_dtype = "f32", epilogue = [], activation = "int8.token", rotate = 64 : i64}} : () -> ()
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %0 = lb.weight {names = ["l.q.weight", "l.k.weight"]} : () -> !lb.q<48x64, "int8.ch.sym", "panel16"> loc("l")
    %1 = lb.call %x, %0 {kernel = @k_f3cc1744a356ed90} : (tensor<1x?x64xf32>, !lb.q<48x64, "int8.ch.sym", "panel16">) -> tensor<1x?x48xf32> loc("l")
    %ya, %yb = lb.split %1 : (tensor<1x?x48xf32>) -> (tensor<1x?x32xf32>, tensor<1x?x16xf32>) loc("l")
    lb.return %ya, %yb : (tensor<1x?x32xf32>, tensor<1x?x16xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
