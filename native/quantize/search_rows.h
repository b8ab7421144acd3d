// The search of sixteen rows, one a lane, for one instruction set.
#pragma once

#include <algorithm>
#include <vector>

#include "quantize/fits.h"
#include "quantize/lanes.h"
#include "quantize/search.h"

namespace mnemos {
namespace {

constexpr int largest_group = 32, largest_super = 256;
// What is tried for a group: scales from the one that reaches its largest value down, and ends of its range from a
// little outside it inwards, in these steps, which are shares of the distance between two codes (of IQ4's, of 16 even
// ones).
constexpr int symmetric_trials = 15, range_trials = 6;
constexpr int curved_trials = 5;  // scales with which IQ4's shorter side, up to 113, reaches the largest value
constexpr float symmetric_step = 0.2f, range_step = 0.3f;
constexpr float hopeless = 3.0e38f;

inline Floats least(Floats x, Floats y) { return select(x < y, x, y); }
inline Floats greatest(Floats x, Floats y) { return select(x > y, x, y); }
inline Floats reciprocal(Floats x) {
  const Mask some = x != 0.f;
  return select(some, 1.f / select(some, x, all(1.f)), all(0.f));
}
inline float lane(const Floats &x, int l) {
  float y;
  std::memcpy(&y, reinterpret_cast<const char *>(&x) + sizeof(float) * static_cast<size_t>(l), sizeof(y));
  return y;
}
inline Floats as_half(Floats x) {
  alignas(64) float y[lanes];
  store(x, y);
  for (float &one : y) one = float_of(half_of(one));
  return load(y);
}

// An array of Floats; as an argument of a template they would lose their attributes.
class Columns {
 public:
  explicit Columns(int count) : own(static_cast<size_t>(count)) {}
  Floats &operator[](int i) { return own[static_cast<size_t>(i)].lanes; }
  const Floats &operator[](int i) const { return own[static_cast<size_t>(i)].lanes; }

 private:
  struct One {
    Floats lanes = {};
  };
  std::vector<One> own;
};

class RowSearch {
 public:
  RowSearch(const SearchFormat &format, const SearchCosts &costs)
      : f(format), costs(costs), columns(static_cast<int>(costs.columns)), x(columns), original(columns),
        level(columns), scale(columns / f.group), minimum(columns / f.group), integer(columns / f.group),
        minimum_integer(columns / f.group), unit(columns / f.super), minimum_unit(columns / f.super) {}

  void run(const float *values, int rows, int sweeps, const SearchResult &result) {
    for (int j = 0; j < columns; j++) {
      alignas(64) float column[lanes] = {};
      for (int l = 0; l < rows; l++) column[l] = values[static_cast<int64_t>(l) * columns + j];
      x[j] = original[j] = load(column);
    }
    for (int first = 0; first < columns; first += f.group) search_group(first);
    if (sweeps > 0) improve(sweeps);
    store(rows, result);
  }

 private:
  // The nearest of the values that a code stands for, in units of the scale.
  Floats level_of(Floats value, Floats inverse, Floats low) const {
    const Floats scaled = (value - low) * inverse;
    if (f.curved) return nearest_iq4(scaled);
    return clamp(nearest(scaled), static_cast<float>(-f.zero), static_cast<float>(f.top - f.zero));
  }
  // The largest magnitude of a level, where these are on both sides of zero.
  float reach() const { return f.curved ? -iq4_values[0] : static_cast<float>(f.zero); }

  // What the columns of a group cost with this scale, each made up for by those after it. With `errors`, the levels
  // are kept.
  Floats try_group(int first, Floats s, Floats low, Floats *errors) {
    Floats rest[largest_group];
    for (int j = 0; j < f.group; j++) rest[j] = x[first + j];
    const Floats inverse = reciprocal(s);
    Floats cost = {};
    for (int j = 0; j < f.group; j++) {
      const float *u = costs.factor + static_cast<int64_t>(first + j) * columns + first;
      const Floats q = level_of(rest[j], inverse, low);
      const Floats error = (rest[j] - (s * q + low)) * (1.f / u[j]);
      cost += error * error;
      if (errors) {
        errors[j] = error;
        level[first + j] = q;
      }
      for (int k = j + 1; k < f.group; k++) rest[k] -= error * u[k];
    }
    return cost;
  }

  void search_group(int first) {
    const int g = first / f.group, b = first / f.super;
    const bool nested = f.super != f.group;
    if (nested && first % f.super == 0) choose_units(first);
    Floats low = x[first], high = x[first];
    for (int j = 1; j < f.group; j++) {
      low = least(low, x[first + j]);
      high = greatest(high, x[first + j]);
    }
    Floats best = all(hopeless);
    scale[g] = minimum[g] = integer[g] = minimum_integer[g] = all(0.f);
    const auto attempt = [&](Floats s, Floats m) {
      Floats i = {}, n = {};
      if (nested) {
        i = clamp(nearest(s * reciprocal(unit[b])), static_cast<float>(f.scale_low), static_cast<float>(f.scale_top));
        s = unit[b] * i;
        n = clamp(nearest(-m * reciprocal(minimum_unit[b])), 0, static_cast<float>(f.minimum_top));
        m = -(minimum_unit[b] * n);
      } else {
        s = as_half(s);
        m = as_half(m);
      }
      const Floats cost = try_group(first, s, m, nullptr);
      const Mask better = cost < best;
      best = select(better, cost, best);
      scale[g] = select(better, s, scale[g]);
      minimum[g] = select(better, m, minimum[g]);
      integer[g] = select(better, i, integer[g]);
      minimum_integer[g] = select(better, n, minimum_integer[g]);
    };
    if (f.minima) {
      if (nested) low = least(low, all(0.f));  // these minima are never positive
      const Floats step = (high - low) * (range_step / static_cast<float>(f.top));
      for (int i = -1; i < range_trials - 1; i++) {
        for (int k = -1; k < range_trials - 1; k++) {
          const Floats from = low + step * static_cast<float>(i), to = high - step * static_cast<float>(k);
          attempt((to - from) / static_cast<float>(f.top), from);
        }
      }
    } else {
      const Floats whole = greatest(high, -low) / reach();
      const float step = symmetric_step / static_cast<float>(f.curved ? (f.top + 1) / 2 : f.zero);
      for (int i = f.curved ? -curved_trials : 0; i < symmetric_trials; i++) {
        const Floats s = whole * (1.f - step * static_cast<float>(i));
        attempt(s, all(0.f));
        if (f.top % 2) attempt(-s, all(0.f));  // the codes reach farther on one side
      }
    }
    if (!nested) {
      unit[b] = scale[g];
      minimum_unit[b] = minimum[g];
    }
    Floats errors[largest_group];
    try_group(first, scale[g], minimum[g], errors);
    for (int k = first + f.group; k < columns; k++) {
      Floats rest = x[k];
      for (int j = 0; j < f.group; j++) rest -= errors[j] * costs.factor[static_cast<int64_t>(first + j) * columns + k];
      x[k] = rest;
    }
  }

  // The units of the groups from `first` on, by their ranges.
  void choose_units(int first) {
    Floats largest = {}, lowest = {};
    for (int begin = first; begin < first + f.super; begin += f.group) {
      Floats low = {}, high = {};
      for (int j = begin; j < begin + f.group; j++) {
        low = least(low, x[j]);
        high = greatest(high, x[j]);
      }
      largest = greatest(largest, f.minima ? (high - low) / static_cast<float>(f.top) : greatest(high, -low) / reach());
      lowest = least(lowest, low);
    }
    const int b = first / f.super;
    unit[b] = as_half(largest / static_cast<float>(f.scale_top));
    minimum_unit[b] = f.minima ? as_half(-lowest / static_cast<float>(f.minimum_top)) : all(0.f);
  }

  // Scales by least squares and codes one at a time, on the whole cost.
  void improve(int sweeps) {
    Columns slope(columns), now(columns);
    for (int j = 0; j < columns; j++) {
      now[j] = scale[j / f.group] * level[j] + minimum[j / f.group];
      move(slope, j, now[j] - original[j]);
    }
    for (int sweep = 0; sweep < sweeps; sweep++) {
      for (int g = 0; g < columns / f.group; g++) fit_scale(g, slope, now);
      for (int b = 0; f.super != f.group && b < columns / f.super; b++) fit_units(b, slope, now);
      for (int j = 0; j < columns; j++) {
        const Floats s = scale[j / f.group], low = minimum[j / f.group];
        const float curve = costs.products[static_cast<int64_t>(j) * columns + j];
        const Floats q = level_of(now[j] - slope[j] * (1.f / curve), reciprocal(s), low);
        const Mask changed = (q != level[j]) & (s != 0.f);
        if (!any(changed)) continue;
        const Floats step = select(changed, s * q + low - now[j], all(0.f));
        level[j] = select(changed, q, level[j]);
        now[j] += step;
        move(slope, j, step);
      }
    }
  }

  void move(Columns &slope, int column, Floats step) const {
    const float *p = costs.products + static_cast<int64_t>(column) * columns;
    for (int k = 0; k < columns; k++) slope[k] += step * p[k];
  }

  // How the cost changes where `count` columns from `first` on move by x v + y w.
  struct Plane {
    Floats along_v = {}, along_w = {}, vv = {}, vw = {}, ww = {};

    Floats gain(Floats x, Floats y) const {
      return x * along_v + y * along_w + x * y * vw + 0.5f * (x * x * vv + y * y * ww);
    }
    // Where it falls most.
    void lowest(bool both, Floats &x, Floats &y) const {
      x = -along_v * reciprocal(vv);
      y = all(0.f);
      if (!both) return;
      const Floats determinant = vv * ww - vw * vw;
      const Mask solvable = determinant > 1e-5f * vv * ww;
      const Floats inverse = select(solvable, reciprocal(determinant), all(0.f));
      x = (along_w * vw - along_v * ww) * inverse;
      y = (along_v * vw - along_w * vv) * inverse;
    }
  };
  Plane plane(int first, int count, const Floats *v, const Floats *w, const Columns &slope) const {
    Plane found;
    for (int j = 0; j < count; j++) {
      const float *p = costs.products + static_cast<int64_t>(first + j) * columns + first;
      Floats pv = {}, pw = {};
      for (int k = 0; k < count; k++) pv += v[k] * p[k];
      found.along_v += v[j] * slope[first + j];
      found.vv += v[j] * pv;
      if (!f.minima) continue;
      for (int k = 0; k < count; k++) pw += w[k] * p[k];
      found.along_w += w[j] * slope[first + j];
      found.vw += v[j] * pw;
      found.ww += w[j] * pw;
    }
    return found;
  }
  void move_columns(int first, int count, const Floats *v, Floats x, const Floats *w, Floats y, Columns &slope,
                    Columns &now) {
    for (int j = 0; j < count; j++) {
      const Floats change = x * v[j] + y * w[j];
      now[first + j] += change;
      move(slope, first + j, change);
    }
  }

  // A group's scale and minimum by least squares, with its codes as they are.
  void fit_scale(int g, Columns &slope, Columns &now) {
    const int first = g * f.group, b = first / f.super;
    const bool nested = f.super != f.group;
    Floats v[largest_group], w[largest_group];
    for (int j = 0; j < f.group; j++) {
      v[j] = level[first + j];
      w[j] = all(1.f);
    }
    const Plane cost = plane(first, f.group, v, w, slope);
    Floats x, y, i = {}, n = {};
    cost.lowest(f.minima, x, y);
    Floats s = scale[g] + x, m = minimum[g] + y;
    if (nested) {
      i = clamp(nearest(s * reciprocal(unit[b])), static_cast<float>(f.scale_low), static_cast<float>(f.scale_top));
      n = clamp(nearest(-m * reciprocal(minimum_unit[b])), 0, static_cast<float>(f.minimum_top));
      s = unit[b] * i;
      m = -(minimum_unit[b] * n);
    } else {
      s = as_half(s);
      m = as_half(m);
    }
    x = s - scale[g];
    y = m - minimum[g];
    const Mask better = cost.gain(x, y) < 0.f;
    if (!any(better)) return;
    scale[g] = select(better, s, scale[g]);
    minimum[g] = select(better, m, minimum[g]);
    if (nested) {
      integer[g] = select(better, i, integer[g]);
      minimum_integer[g] = select(better, n, minimum_integer[g]);
    } else {
      unit[g] = scale[g];
      minimum_unit[g] = minimum[g];
    }
    move_columns(first, f.group, v, select(better, x, all(0.f)), w, select(better, y, all(0.f)), slope, now);
  }

  // The units of a super-block by least squares, with the integers and codes of its groups as they are.
  void fit_units(int b, Columns &slope, Columns &now) {
    const int first = b * f.super;
    Floats v[largest_super], w[largest_super];
    for (int j = 0; j < f.super; j++) {
      const int g = (first + j) / f.group;
      v[j] = integer[g] * level[first + j];
      w[j] = -minimum_integer[g];
    }
    const Plane cost = plane(first, f.super, v, w, slope);
    Floats x, y;
    cost.lowest(f.minima, x, y);
    const Floats u = as_half(unit[b] + x), m = as_half(minimum_unit[b] + y);
    x = u - unit[b];
    y = m - minimum_unit[b];
    const Mask better = (cost.gain(x, y) < 0.f) & (m >= 0.f);
    if (!any(better)) return;
    unit[b] = select(better, u, unit[b]);
    minimum_unit[b] = select(better, m, minimum_unit[b]);
    for (int g = first / f.group; g < (first + f.super) / f.group; g++) {
      scale[g] = unit[b] * integer[g];
      minimum[g] = -(minimum_unit[b] * minimum_integer[g]);
    }
    move_columns(first, f.super, v, select(better, x, all(0.f)), w, select(better, y, all(0.f)), slope, now);
  }

  Floats code_of(Floats q) const { return f.curved ? nearest_iq4_code(q) : q + static_cast<float>(f.zero); }

  void store(int rows, const SearchResult &result) const {
    for (int l = 0; l < rows; l++) {
      uint8_t *codes = result.codes + static_cast<int64_t>(l) * columns;
      for (int j = 0; j < columns; j++) codes[j] = static_cast<uint8_t>(static_cast<int>(lane(code_of(level[j]), l)));
      float *units = result.units + static_cast<int64_t>(l) * (columns / f.super) * 2;
      for (int b = 0; b < columns / f.super; b++) {
        units[2 * b] = lane(unit[b], l);
        units[2 * b + 1] = lane(minimum_unit[b], l);
      }
      int8_t *integers = result.integers + static_cast<int64_t>(l) * (columns / f.group) * 2;
      for (int g = 0; g < columns / f.group; g++) {
        integers[2 * g] = static_cast<int8_t>(static_cast<int>(lane(integer[g], l)));
        integers[2 * g + 1] = static_cast<int8_t>(static_cast<int>(lane(minimum_integer[g], l)));
      }
    }
  }

  const SearchFormat &f;
  const SearchCosts &costs;
  const int columns;
  Columns x;  // the weights, with what the columns before them have cost
  Columns original;  // the weights
  Columns level;  // what the codes stand for, in units of their scale
  Columns scale, minimum, integer, minimum_integer;  // by group
  Columns unit, minimum_unit;  // by `super`
};

void search_sixteen_rows(const SearchFormat &format, const SearchCosts &costs, const float *values, int rows,
                         int sweeps, const SearchResult &result) {
  RowSearch(format, costs).run(values, rows, sweeps, result);
}

}  // namespace
}  // namespace mnemos
