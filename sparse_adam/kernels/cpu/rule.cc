#include "rule.h"

namespace sparse_adam {
namespace {

// Set before any code runs, so it does not matter which file's rule comes first.
const RegisteredRule* first_rule = nullptr;

}  // namespace

RegisteredRule::RegisteredRule(const char* name, int num_constants, Choose choose)
    : name_(name), num_constants_(num_constants), choose_(choose), next_(first_rule) {
  first_rule = this;
}

const RegisteredRule* RegisteredRule::First() { return first_rule; }

const RegisteredRule* RegisteredRule::Find(std::string_view name) {
  const RegisteredRule* rule = first_rule;
  while (rule != nullptr && rule->name() != name) rule = rule->next();
  return rule;
}

}  // namespace sparse_adam
