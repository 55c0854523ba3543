      const bool finite = largest < bits_float(0x7f800000);
      scale = largest > 1e-30f ? divide(largest, top) : 0.0f;
      inverse = largest > 1e-30f && finite ? divide(1.0f, scale) : 0.0f;
      if (!finite) scale = bits_float(0x7fc00000);
      if (T::ASYM_X && group >= T::X_WIDE) {
        least = rintf(from * inverse * T::X_CLIP);
        top += least;
      }
