// Vectors of 4, 8 and 16 floats, for centroids: the last is the instruction set's own F.
typedef __m128 F4;
typedef __m256 F8;
typedef F F16;

LB_INLINE F4 zero4() { return _mm_setzero_ps(); }
LB_INLINE F8 zero8() { return _mm256_setzero_ps(); }
LB_INLINE F16 zero16() { return fzero(); }
LB_INLINE F4 set4(float x) { return _mm_set1_ps(x); }
LB_INLINE F8 set8(float x) { return _mm256_set1_ps(x); }
LB_INLINE F16 set16(float x) { return fset1(x); }
LB_INLINE F4 load4(const float* p) { return _mm_loadu_ps(p); }
LB_INLINE F8 load8(const float* p) { return _mm256_loadu_ps(p); }
LB_INLINE F16 load16(const float* p) { return fload(p); }
LB_INLINE F4 load4(const uint16_t* p) { return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)); }
LB_INLINE F8 load8(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
LB_INLINE F16 load16(const uint16_t* p) { return load_f16(p); }
LB_INLINE void store(float* p, F4 x) { _mm_storeu_ps(p, x); }
LB_INLINE void store(float* p, F8 x) { _mm256_storeu_ps(p, x); }
LB_INLINE void store(float* p, F16 x) { fstore(p, x); }
LB_INLINE F4 fadd(F4 x, F4 y) { return _mm_add_ps(x, y); }
LB_INLINE F8 fadd(F8 x, F8 y) { return _mm256_add_ps(x, y); }
LB_INLINE F4 fma_(F4 x, F4 y, F4 z) { return _mm_fmadd_ps(x, y, z); }
LB_INLINE F8 fma_(F8 x, F8 y, F8 z) { return _mm256_fmadd_ps(x, y, z); }
