#include "bind.h"

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a model held by a global at exit is no leak of ours
  m.doc() = "Paceline's native core; see csrc/README.md.";
  paceline::bind_buffer(m);
  paceline::bind_device(m);
  paceline::bind_adapter(m);
  paceline::bind_step(m);
  paceline::bind_program(m);
}
