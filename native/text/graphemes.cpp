// Extended grapheme clusters, after the rules of UAX 29 (GB3 to GB13).
#include "text/unicode.h"
#include "text/unicode_data.h"

namespace mnemos {
namespace {

// The low four bits of a break property, in the order of tools/unicode_tables.py, and further bits.
enum Kind : uint8_t { other, cr, lf, control, extend, zwj, regional, prepend, spacing, lead, vowel, tail, lv, lvt };
constexpr uint8_t kind_bits = 0x0F, pictograph = 0x10, consonant = 0x20, linker = 0x40, conjoined = 0x80;

bool joins_hangul(uint8_t before, uint8_t after) {
  if (before == lead) return after == lead || after == vowel || after == lv || after == lvt;
  if (before == lv || before == vowel) return after == vowel || after == tail;
  return (before == lvt || before == tail) && after == tail;
}

}  // namespace

size_t grapheme_end(std::string_view text, size_t at) {
  static const CharacterTable table(grapheme_break_runs, grapheme_break_runs_size);
  if (at >= text.size()) return text.size();
  uint8_t before = table[next_character(text, at)];
  int regionals = (before & kind_bits) == regional;
  bool after_pictograph = before & pictograph;  // then only Extend
  bool after_consonant = before & consonant, linked = false;
  while (at < text.size()) {
    size_t next = at;
    const uint8_t now = table[next_character(text, next)];
    const uint8_t b = before & kind_bits, n = now & kind_bits;
    bool joined = n == extend || n == zwj || n == spacing || b == prepend || joins_hangul(b, n);
    joined = joined || (b == zwj && after_pictograph && (now & pictograph));
    joined = joined || (b == regional && n == regional && regionals % 2 == 1);
    joined = joined || (after_consonant && linked && (now & consonant));
    if (b == cr || b == lf || b == control || n == cr || n == lf || n == control) joined = b == cr && n == lf;
    if (!joined) break;
    regionals = n == regional ? regionals + 1 : 0;
    after_pictograph = (now & pictograph) || (after_pictograph && (n == extend || n == zwj));
    if (now & consonant)
      after_consonant = true, linked = false;
    else if (after_consonant && (now & linker))
      linked = true;
    else if (!(now & conjoined))
      after_consonant = linked = false;
    before = now;
    at = next;
  }
  return at;
}

}  // namespace mnemos
