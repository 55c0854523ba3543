// PASSES: lower-kernels{compute="float"},fold-scales
builtin.module {
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.0.q.weight"]} : () -> !lb.q<32x64, "e3m2.ch", "panel16"> loc("l.0.q")
    %ya = lb.linear %x, %a : (tensor<1x?x64xf32>, !lb.q<32x64, "e3m2.ch", "panel16">) -> tensor<1x?x32xf32> loc("l.0.q")
    %b = lb.weight {names = ["l.1.q.weight"]} : () -> !lb.q<32x64, "int4.g32.sym", "panel16"> loc("l.1.q")
    %yb = lb.linear %x, %b : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym", "panel16">) -> tensor<1x?x32xf32> loc("l.1.q")
    lb.return %ya, %yb : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
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
    %12 = "lbk.mma"(%10, %11) : (tensor<?x64xf32>, !lb.q<32x64, "int4.g32.sym">) -> tensor<?x32xf32>
    "lbk.yield"(%12) : (tensor<?x32xf32>) -> ()
  }) {sym_name = "k_36df0892c713d640", spec = {segments = [32 : i64], k = 64 : i64, format = "int4.g32.sym", layout = "n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32", compute = "float", x_dtype = "f32", out_dtype = "f32", epilogue = []}, scales = {place = "loop", factor = 1.000000e+00 : f32, reason = "int4 is decoded without a power of two"}} : () -> ()
  "lbk.kernel"() ({
  ^bb0(%0: i32, %1: i32, %2: i32, %3: i32, %4: f32):
    "lbk.arg"(%0) {label = "w0"} : (i32) -> ()
    "lbk.arg"(%1) {label = "s0"} : (i32) -> ()
    "lbk.arg"(%2) {label = "w1"} : (i32) -> ()
    "lbk.arg"(%3) {label = "s1"} : (i32) -> ()
    "lbk.arg"(%4) {label = "scale"} : (f32) -> ()
    %5 = "lbk.shr"(%0, %1) : (i32, i32) -> i32
    %6 = "lbk.int"() {value = #builtin.int<15>} : () -> i32
    %7 = "lbk.and"(%5, %6) : (i32, i32) -> i32
    %8 = "lbk.shr"(%2, %3) : (i32, i32) -> i32
    %9 = "lbk.int"() {value = #builtin.int<3>} : () -> i32
    %10 = "lbk.and"(%8, %9) : (i32, i32) -> i32
    %11 = "lbk.int"() {value = #builtin.int<4>} : () -> i32
    %12 = "lbk.shl"(%10, %11) : (i32, i32) -> i32
    %13 = "lbk.or"(%7, %12) : (i32, i32) -> i32
    %14 = "lbk.int"() {value = #builtin.int<32>} : () -> i32
    %15 = "lbk.and"(%13, %14) : (i32, i32) -> i32
    %16 = "lbk.int"() {value = #builtin.int<10>} : () -> i32
    %17 = "lbk.shl"(%15, %16) : (i32, i32) -> i32
    %18 = "lbk.int"() {value = #builtin.int<31>} : () -> i32
    %19 = "lbk.and"(%13, %18) : (i32, i32) -> i32
    %20 = "lbk.int"() {value = #builtin.int<8>} : () -> i32
    %21 = "lbk.shl"(%19, %20) : (i32, i32) -> i32
    %22 = "lbk.or"(%17, %21) : (i32, i32) -> i32
    %23 = "lbk.half"(%22) : (i32) -> f32
    %24 = "lbk.mul"(%23, %4) : (f32, f32) -> f32
    "lbk.yield"(%24) : (f32) -> ()
  }, {
  ^bb0(%25: tensor<?x64xf32>, %26: !lb.q<32x64, "e3m2.ch">):
    %27 = "lbk.mma"(%25, %26) : (tensor<?x64xf32>, !lb.q<32x64, "e3m2.ch">) -> tensor<?x32xf32>
    "lbk.yield"(%27) : (tensor<?x32xf32>) -> ()
  }) {sym_name = "k_390ef67ceae7b1de", spec = {segments = [32 : i64], k = 64 : i64, format = "e3m2.ch", layout = "n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32", compute = "float", x_dtype = "f32", out_dtype = "f32", epilogue = []}, scales = {place = "epilogue", factor = 4.096000e+03 : f32, reason = "e3m2 as f16 is its value times 2**-12"}} : () -> ()
  "lb.graph"() ({
  ^bb0(%x: tensor<1x?x64xf32>):
    %a = lb.weight {names = ["l.0.q.weight"]} : () -> !lb.q<32x64, "e3m2.ch", "panel16"> loc("l.0.q")
    %ya = lb.call %x, %a {kernel = @k_390ef67ceae7b1de} : (tensor<1x?x64xf32>, !lb.q<32x64, "e3m2.ch", "panel16">) -> tensor<1x?x32xf32> loc("l.0.q")
    %b = lb.weight {names = ["l.1.q.weight"]} : () -> !lb.q<32x64, "int4.g32.sym", "panel16"> loc("l.1.q")
    %yb = lb.call %x, %b {kernel = @k_36df0892c713d640} : (tensor<1x?x64xf32>, !lb.q<32x64, "int4.g32.sym", "panel16">) -> tensor<1x?x32xf32> loc("l.1.q")
    lb.return %ya, %yb : (tensor<1x?x32xf32>, tensor<1x?x32xf32>) -> ()
  }) {sym_name = "m"} : () -> ()
}
