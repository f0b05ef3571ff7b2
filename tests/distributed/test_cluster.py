from jax._src.clusters import cloud_tpu_cluster
import pytest

from topklm.distributed import coordination
from topklm.distributed.coordination import ClusterProcess
from topklm.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[007-008],gpu1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_NTASKS": "9",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_VERSION": "4.1.6",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
TPU_SLICES = {
    "TPU_WORKER_HOSTNAMES": "localhost,job-1.pods",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.fixture
def find(monkeypatch):
    """Finds a process in an environment with some more variables."""

    def find_with(**variables: str) -> ClusterProcess | None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return coordination.find_process()

    return find_with


def explicit(coordinator: str, process_id: str, count: str) -> dict[str, str]:
    names = ("TOPKLM_COORDINATOR", "TOPKLM_PROCESS_ID", "TOPKLM_PROCESS_COUNT")
    return dict(zip(names, (coordinator, process_id, count), strict=True))


def test_without_any_sign_of_others_a_process_is_alone(find):
    assert find() is None


def test_three_variables_say_it_outright(find):
    assert find(**explicit("10.0.0.2:8476", "3", "4")) == ClusterProcess(3, 4, "10.0.0.2", 8476)
    assert find(**explicit("[fd00::2]:9000", "0", "2")) == ClusterProcess(0, 2, "fd00::2", 9000)
    assert find(**explicit("10.0.0.2:8476", "0", "1")) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TOPKLM_PROCESS_ID": "1"}, "TOPKLM_COORDINATOR and TOPKLM_PROCESS_COUNT: missing, while"),
        (explicit("10.0.0.2", "0", "2"), "TOPKLM_COORDINATOR = '10.0.0.2': must be host:port"),
        (explicit("a:1", "2", "2"), "TOPKLM_PROCESS_ID = '2': must be a whole number, 0 to 1"),
        (explicit("a:1", "0", "two"), "TOPKLM_PROCESS_COUNT = 'two': must be a whole number, 1 or more"),
        ({"TOPKLM_DISTRIBUTED": "no"}, "TOPKLM_DISTRIBUTED = 'no': must be auto or off"),
    ],
)
def test_variables_that_do_not_fit_are_named(find, variables, message):
    with pytest.raises(UserError, match=message):
        find(**variables)


def test_slurm_gives_each_process_its_gpu(find):
    assert find(**SLURM) == ClusterProcess(6, 9, "node007", 8476, local_device_ids=(2,))


def test_slurm_leaves_all_gpus_to_a_process_that_is_alone_on_its_host(find):
    last = {"SLURM_PROCID": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert find(**SLURM | last) == ClusterProcess(8, 9, "node007", 8476)


def test_a_gpu_that_slurm_has_chosen_is_not_chosen_again(find):
    assert find(**SLURM, CUDA_VISIBLE_DEVICES="2") == ClusterProcess(6, 9, "node007", 8476)


def test_the_port_of_launched_runs_can_be_set(find):
    assert find(**SLURM, JAX_COORDINATOR_PORT="9100").port == 9100


def test_open_mpi_is_read(find):
    assert find(**OPEN_MPI) == ClusterProcess(1, 2, "10.96.0.1", 8476)


def test_hosts_of_several_tpu_slices_are_numbered_through(find, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    assert find(**TPU_SLICES) == ClusterProcess(3, 4, "localhost", 8476)


def test_a_lone_pod_of_kubernetes_is_alone(find, recwarn):
    assert find(KUBERNETES_SERVICE_HOST="10.0.0.1") is None
    assert not [warning for warning in recwarn if "Kubernetes" in str(warning.message)]


def test_what_a_launcher_says_can_be_turned_off_and_overruled(find):
    assert find(**SLURM, **explicit("a:1", "0", "2")) == ClusterProcess(0, 2, "a", 1)
    assert find(TOPKLM_DISTRIBUTED="off") is None


def test_a_launcher_that_cannot_be_understood_is_a_users_matter(find):
    with pytest.raises(UserError, match=r"its index cannot be read \(.*\): set TOPKLM_COORDINATOR"):
        find(**SLURM | {"SLURM_NTASKS": "many"})
