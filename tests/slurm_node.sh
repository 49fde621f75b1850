#!/bin/bash
# A real Slurm of one node without systemd, for tests: `slurm_node.sh up FOLDER`, `slurm_node.sh down FOLDER`. Needs root.
set -eu
home=$2
export SLURM_CONF=$home/slurm.conf
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
if [ "$1" = down ]; then
  for file in "$home/slurmd.pid" "$home/slurmctld.pid"; do alive "$file" && kill "$(cat "$file")" || true; done
  exit 0
fi
mkdir -p "$home"/{state,spool,log}
host=$(hostname -s)
cat > "$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=5
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmctldPort=26817
SlurmdPort=26818
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
printf 'CgroupPlugin=cgroup/v1\nIgnoreSystemd=yes\n' > "$home/cgroup.conf"
if ! alive /run/munge/munged.pid; then
  install -d -o munge -g munge -m 755 /run/munge
  [ -s /etc/munge/munge.key ] || mungekey
  setpriv --reuid munge --regid munge --clear-groups munged --force
fi
alive "$home/slurmctld.pid" || slurmctld
alive "$home/slurmd.pid" || slurmd -N "$host"
for _ in $(seq 30); do
  case $(sinfo -h -o %T 2>/dev/null) in idle | mixed | allocated) exit 0 ;; esac
  sleep 1
done
echo "Slurm did not come up: see $home/log" >&2
exit 1
