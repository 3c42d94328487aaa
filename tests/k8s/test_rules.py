"""Every rule holds for every overlay."""

import pytest
from rules import availability, gpus, network, pod_security, probes, references, settings, tls

RULES = (
    # K1
    pod_security.namespace_is_restricted,
    pod_security.pods_are_restricted,
    pod_security.accounts_have_no_token,
    # K2
    network.only_the_edges_that_exist,
    # K3
    availability.disruption_budgets,
    availability.one_pod_may_go,
    availability.scaled_by_what_is_there,
    # K4
    probes.probes_ask_the_role,
    probes.every_container_has_probes,
    probes.probes_are_patient_where_they_kill,
    probes.grace_is_longer_than_the_drain,
    # What refers to what
    references.services_find_pods,
    references.pods_have_names_before_they_are_ready,
    references.clients_meet_who_is_ready,
    references.workloads_select_their_own_pods,
    references.selectors_match_something,
    references.scheduling_counts_its_own_pods,
    references.what_is_referred_to_exists,
    references.mounts_are_volumes,
    references.resources_are_bounded,
    references.images_are_pinned,
    references.no_variables_of_services,
    # What the programs are told
    settings.programs_know_their_settings,
    settings.programs_are_called_right,
    settings.pods_are_who_they_say,
    settings.all_are_of_one_cluster,
    settings.sizes_fit,
    tls.certificates_name_the_pod,
    tls.programs_find_the_files,
    tls.all_or_none_have_tls,
    tls.the_authority_outlives_its_certificates,
    gpus.each_worker_has_one,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_holds(rule, docs):
    assert list(rule(docs)) == []
