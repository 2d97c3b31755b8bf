// The shared library's one entry: registers the operators of the domain "step35" for a session.
#include <stdatomic.h>

#include "ort_api.h"

extern const ort_op gated_attention_op, int4_linear_op, int4_gated_linear_op, int4_experts_op, chain_op, greedy_op;

__attribute__((visibility("default"))) ort_status *RegisterCustomOps(ort_session_options *options,
                                                                     const ort_api_base *base) {
  // Sessions keep a pointer to the domain, so one is made and kept for as long as the library is loaded.
  static _Atomic(ort_domain *) shared;
  const ort_api *api = base->get_api(ORT_VERSION);
  ort_domain *domain = atomic_load(&shared);
  if (!domain) {
    static const ort_op *const ops[] = {&gated_attention_op, &int4_linear_op, &int4_gated_linear_op,
                                         &int4_experts_op, &chain_op, &greedy_op};
    ort_status *status = ort_create_domain(api)("step35", &domain);
    for (size_t i = 0; i < sizeof ops / sizeof *ops && !status; i++) status = ort_domain_add(api)(domain, ops[i]);
    if (status) return status;
    ort_domain *first = NULL;
    if (!atomic_compare_exchange_strong(&shared, &first, domain)) {
      ort_release_domain(api)(domain);
      domain = first;
    }
  }
  return ort_options_add_domain(api)(options, domain);
}
