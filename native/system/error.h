// Errors that reach Python as the exceptions of mnemos.errors; the bindings translate them by kind.
#pragma once

#include <stdexcept>
#include <string>

namespace mnemos {

enum class ErrorKind { config, request, unsupported, capacity, format };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string &message) : std::runtime_error(message), kind(kind) {}
  const ErrorKind kind;
};

// A parameter has a value that is not allowed.
inline Error config_error(const std::string &message) { return Error(ErrorKind::config, message); }

// A request cannot be run.
inline Error request_error(const std::string &message) { return Error(ErrorKind::request, message); }

inline Error unsupported_error(const std::string &message) { return Error(ErrorKind::unsupported, message); }

inline Error capacity_error(const std::string &message) { return Error(ErrorKind::capacity, message); }

inline Error format_error(const std::string &message) { return Error(ErrorKind::format, message); }

}  // namespace mnemos
