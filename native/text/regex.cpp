#include "text/regex.h"

#include <algorithm>

namespace mnemos {
namespace {

constexpr uint32_t none = RegexStep::none;
constexpr size_t most_steps = 10'000'000;  // for one match, as Oniguruma has it

bool is_word(std::string_view text, size_t at, bool before) {
  static const CharacterSet words = [] {
    CharacterSet set = CharacterSet::flag(0);
    set.finish();
    return set;
  }();
  if (before ? at == 0 : at >= text.size()) return false;
  return words.contains(before ? previous_character(text, at) : next_character(text, at));
}

}  // namespace

bool Regex::find(std::string_view text, size_t from, size_t &begin, size_t &end) const {
  thread_local Run run;
  run.text = text;
  for (size_t at = from; at < text.size();) {
    size_t next = at;
    if (first_.contains(next_character(text, next))) {
      run.frames.clear();
      run.steps = 0;
      if (match(run, 0, at, end)) {
        begin = at;
        return true;
      }
    }
    at = next;
  }
  return false;
}

bool Regex::holds(const RegexStep &step, std::string_view text, size_t at) const {
  switch (step.op) {
    case RegexStep::at_begin: return at == 0;
    case RegexStep::at_end: return at == text.size();
    case RegexStep::at_last: return at == text.size() || (at + 1 == text.size() && text[at] == '\n');
    case RegexStep::at_line_begin: return at == 0 || (text[at - 1] == '\n' && at < text.size());
    case RegexStep::at_line_end: return at == text.size() || text[at] == '\n';
    default: return (is_word(text, at, true) != is_word(text, at, false)) == (step.op == RegexStep::at_boundary);
  }
}

bool Regex::match(Run &run, uint32_t step, size_t at, size_t &end) const {
  const std::string_view text = run.text;
  const size_t bottom = run.frames.size();
  for (;;) {
    if (++run.steps > most_steps) throw TooManySteps();
    const RegexStep &now = steps_[step];
    bool ok = true;
    switch (now.op) {
      case RegexStep::set: {
        size_t next = at;
        ok = at < text.size() && sets_[now.a].contains(next_character(text, next));
        at = next;
        step++;
        break;
      }
      case RegexStep::loop:
      case RegexStep::all: {
        const CharacterSet &set = sets_[now.a];
        size_t least = at;
        uint32_t count = 0;
        while (count < now.c && at < text.size()) {
          size_t next = at;
          if (!set.contains(next_character(text, next))) break;
          at = next;
          if (++count == now.b) least = at;
        }
        ok = count >= now.b;
        step++;
        if (now.op == RegexStep::loop && ok && count > now.b) run.frames.push_back({step, at, least});
        break;
      }
      case RegexStep::fork:
        if (now.c != none) {
          size_t next = at;
          if (at == text.size() || !sets_[now.c].contains(next_character(text, next))) {
            step = now.b;
            break;
          }
        }
        run.frames.push_back({now.b, at, at});
        step = now.a;
        break;
      case RegexStep::jump: step = now.a; break;
      case RegexStep::look_ahead: {
        size_t ignored;
        ok = match(run, step + 1, at, ignored) != bool(now.c);
        step = now.a;
        break;
      }
      case RegexStep::look_back: {
        size_t before = at;
        ok = (at > 0 && sets_[now.a].contains(previous_character(text, before))) != bool(now.c);
        step++;
        break;
      }
      case RegexStep::atomic:
        ok = match(run, step + 1, at, at);
        step = now.a;
        break;
      case RegexStep::done:
        run.frames.resize(bottom);
        end = at;
        return true;
      default: ok = holds(now, text, at); step++;
    }
    if (ok) continue;
    if (run.frames.size() == bottom) return false;
    Frame &frame = run.frames.back();
    step = frame.step;
    if (frame.at > frame.least) {
      previous_character(text, frame.at);
      at = frame.at;
      if (frame.at == frame.least) run.frames.pop_back();
    } else {
      at = frame.at;
      run.frames.pop_back();
    }
  }
}

}  // namespace mnemos
