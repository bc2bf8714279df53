"""A real Slurm cluster of two nodes on this machine, in namespaces of its own: nothing of it outlives its process.

Needs root (or the right to unshare) and the packages slurmctld, slurmd, slurm-client and munge.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
CONF = """ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={base}/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,requeue_delay=2
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
KillWait=20
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=gpu[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
BOOT = """set -eu
ip link set lo up
ip link add v0 type veth peer name v1
ip addr add 10.77.0.1/24 dev v0
ip link set v0 up
ip link set v1 up
munged --key-file={base}/munge.key --socket={base}/munge/munge.sock --pid-file={base}/munge/munged.pid \\
    --log-file={base}/log/munged.log --seed-file={base}/munge/seed --num-threads=2
slurmctld -c
for node in gpu1 gpu2; do slurmd -N $node; done
while true; do sleep 1000 & wait $!; done  # bash, as the first process of its namespace, also buries the dead
"""


def missing():
    """Why no cluster can run here; '' where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)}); apt-get install --no-install-recommends {PACKAGES}"
    if shutil.which("ip") is None:
        return "no ip command here; apt-get install iproute2"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "no right to make namespaces here (unshare): run the tests as root"
    return ""


class LocalSlurm:
    """The running cluster; `command` puts words of a command line into it."""

    def __init__(self) -> None:
        # Not below pytest's folders, which are closed to others: munged refuses a socket there.
        self.base = base = Path(tempfile.mkdtemp(prefix="slurm-"))
        for name in ("munge", "state", "spool/gpu1", "spool/gpu2", "log"):
            (base / name).mkdir(parents=True)
        base.chmod(0o711)
        (base / "munge").chmod(0o755)
        (base / "munge.key").write_bytes(os.urandom(128))
        (base / "munge.key").chmod(0o400)
        host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (base / "slurm.conf").write_text(CONF.format(base=base, host=host, user=user))
        self.environment = {**os.environ, "SLURM_CONF": str(base / "slurm.conf")}
        self.process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c",
             BOOT.format(base=base)], env=self.environment, stdout=(base / "log/boot.log").open("wb"),
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._wait_until_idle()

    def command(self, *words: str, folder: Path = Path("/")) -> list[str]:
        """The command line that runs `words` inside, in a folder."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return ["nsenter", "--target", children[0], "--net", "--mount", "--pid", "--", "env", "-C", str(folder), *words]

    def run(self, *words: str, **options) -> subprocess.CompletedProcess:
        """Runs a command of Slurm to its end."""
        return subprocess.run(self.command(*words), env=self.environment, capture_output=True, text=True, **options)

    def _wait_until_idle(self, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, (self.base / "log/boot.log").read_text()
            try:
                if self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == "2":
                    return
            except (IndexError, FileNotFoundError):
                pass
            time.sleep(0.2)
        raise AssertionError((self.base / "log/boot.log").read_text() + (self.base / "log/slurmctld.log").read_text())

    def kill_node(self, name: str) -> None:
        """A node's end: its daemon, the managers of its steps and their tasks are killed at once."""
        daemon = (self.base / f"slurmd-{name}.pid").read_text().strip()
        tasks = f"grep -lazx SLURMD_NODENAME={name} /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3"
        managers = "ps -o ppid= -p $tasks | sort -u"
        self.run("bash", "-c", f"tasks=$({tasks} | paste -sd,); kill -KILL {daemon} $({managers}) ${{tasks//,/ }}")

    def revive(self, name: str) -> None:
        """Starts a node's daemon again."""
        self.run("slurmd", "-N", name, check=True)

    def end(self) -> None:
        """Ends the namespaces and with them every process of the cluster."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.base, ignore_errors=True)
