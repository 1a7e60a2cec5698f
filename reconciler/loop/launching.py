"""From a planned start to a command, its environment and its folder: the last step before `act`."""

from __future__ import annotations

from collections.abc import Mapping

from reconciler.act.account import find_account
from reconciler.act.environment import child_environment, read_env_file
from reconciler.act.process import Launch
from reconciler.errors import ActError
from reconciler.journal.incarnations import new_id
from reconciler.plan.actions import Action
from reconciler.plan.observed import Observed
from reconciler.spec.engines import capability_variable, endpoint_url, gpu_environment, launch
from reconciler.spec.spec import EndpointSpec, OverlaySpec, Questions, Spec


def launch_of(
    action: Action, spec: Spec, observed: Observed, *, inherited: Mapping[str, str], simulated: Mapping[str, str]
) -> Launch:
    """What `act` needs to carry out one start.

    Args:
        action: a `start` or `start_workload`
        spec: where the subject is described
        observed: the GPUs' indices, and the ports of providers
        inherited: this process's environment, of which a declared part is passed on
        simulated: what a simulated node adds (PATH, RECONCILER_SIM_DIR); empty on a real one

    Raises:
        ActError: the subject is no longer described, its user is gone, or its env_file cannot be read.
    """
    base = {**inherited, **simulated}
    gpus = {gpu.uuid: gpu for gpu in observed.gpus}
    indices = [gpus[uuid].index for uuid in action.gpus]
    totals = [gpus[uuid].total_bytes for uuid in action.gpus]
    if action.op == "start":
        endpoint = endpoint_for(action, spec)
        command = launch(endpoint, gpu_indices=indices, gpu_total_bytes=totals, port=endpoint.port)
        argv, own, port = command.argv, dict(command.env), endpoint.port
        env_file, cwd, user, logs, stop = endpoint.env_file, endpoint.cwd, endpoint.user, endpoint.logs, endpoint.stop
        questions: Questions | None = endpoint.questions
    else:
        overlay = spec.overlays.get(action.subject.name)
        if overlay is None or overlay.workload is None:
            raise ActError(f"overlay {action.subject.name} has no workload any more")
        argv, port = overlay.workload.command, None
        own = {**overlay.workload.env, **gpu_environment(indices), **_capability_urls(overlay, spec, observed)}
        own["RECONCILER_GPUS"] = ",".join(map(str, indices))
        work = overlay.workload
        env_file, cwd, user, logs, stop = work.env_file, work.cwd, work.user, work.logs, work.stop
        questions = None
    secrets = read_env_file(env_file) if env_file is not None else {}
    account = find_account(user) if user is not None else None
    marks = {**simulated, "RECONCILER_SUBJECT": action.subject.name}
    return Launch(
        incarnation=new_id(observed.boot_id),
        subject=action.subject,
        process_hash=action.process_hash,
        gpus=action.gpus,
        memory_bytes=action.memory_bytes,
        exclusive=action.exclusive,
        port=port,
        attempt=action.attempt,
        argv=argv,
        env=child_environment(base, account=account, env_file=secrets, env={**own, **marks}),
        cwd=cwd,
        account=account,
        log_bytes=logs.max_bytes,
        stop=stop,
        questions=questions,
    )


def endpoint_for(action: Action, spec: Spec) -> EndpointSpec:
    """The version of an endpoint that this start is about: its overlay's, else the baseline's.

    Raises:
        ActError: neither knows it.
    """
    name = action.subject.name
    versions = [o.endpoints[name] for o in spec.overlays.values() if name in o.endpoints]
    if name in spec.endpoints:
        versions.append(spec.endpoints[name])
    for version in versions:
        if version.process_hash == action.process_hash:
            return version
    raise ActError(f"{name} is no longer described as it was when its start was planned")


def _capability_urls(overlay: OverlaySpec, spec: Spec, observed: Observed) -> dict[str, str]:
    """The URL of one ready provider for each capability that the overlay requires."""
    urls: dict[str, str] = {}
    for capability in overlay.requires:
        for incarnation in observed.incarnations:
            name = incarnation.subject.name
            endpoint = overlay.endpoints.get(name) or spec.endpoints.get(name)
            probe = observed.probes.get(incarnation.id)
            ready = incarnation.subject.kind == "endpoint" and probe is not None and probe.ready
            if ready and endpoint and capability in endpoint.capabilities and incarnation.port is not None:
                urls.setdefault(capability_variable(capability), endpoint_url(incarnation.port))
    return urls
