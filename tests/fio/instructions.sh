#!/bin/sh
# Instructions that kvring's benchmark and fio take in user space for each 4 KiB read of a block device, by callgrind: a
# count, which other work on the machine does not change. The difference of a long and a short run, so that start and
# report do not count. Needs fio and valgrind, and root for a device in memory: tests/fio/instructions.sh [DEVICE]; with
# ENGINE=libaio or ENGINE=io_uring_cmd, then on /dev/ngXnY. `cargo xtask guest cpu` runs it over emulated devices.
set -eu
kvring=${KVRING:-target/release/kvring}
device=${1:-}
engine=${ENGINE:-io_uring}
more=
direct=--direct=1
registered="--fixedbufs=1 --registerfiles=1"
[ "$engine" != libaio ] || registered=
# A character device is not opened with O_DIRECT.
[ "$engine" != io_uring_cmd ] || { more=--cmd_type=nvme direct=; }
if [ -z "$device" ]; then
    device=$(zramctl --find --size 64M)
    trap 'zramctl --reset "$device"' EXIT
    dd if=/dev/urandom of="$device" bs=1M count=64 2>/dev/null
fi
count() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$@" 2>&1 >/dev/null | sed -n 's/.*Collected : //p'
}
for depth in 1 32; do
    job=$(mktemp)
    # Under valgrind 3.19 the program dies looking for the vDSO, unless io_uring was there before: a few reads by that first.
    cat >"$job" <<END
[global]
filename=$device
rw=randread
bs=4k
iodepth=$depth
iodepth_batch=$depth
[first]
ioengine=io_uring
filename=${BLOCK:-$device}
size=64k
[counted]
stonewall
ioengine=$engine
END
    ours="$kvring bench device $job"
    theirs="fio --name=x --filename=$device --rw=randread --bs=4k --iodepth=$depth --iodepth_batch=$depth --ioengine=$engine $more $direct --thread $registered"
    long=$(echo size=40m | cat "$job" - >"$job.fio"; count $ours.fio)
    short=$(echo size=8m | cat "$job" - >"$job.fio"; count $ours.fio)
    rm -f "$job" "$job.fio"
    a=$((long - short))
    b=$(($(count $theirs --size=40m) - $(count $theirs --size=8m)))
    echo "$engine on $device, $depth in flight: kvring $((a / 8192)), fio $((b / 8192)) instructions per 4 KiB read"
done
