//! What is near what: the shard's core, the SSDs, the GPUs and the free hugepages, by NUMA node.

use std::path::{Path, PathBuf};

use super::{Level, Report, gpu, is_in, read};

/// What is to lie on one node.
pub struct Wanted {
    /// `server_cpu`.
    pub cpu: Option<u32>,
    /// Entries of `ssd_cache_dir`, and where sysfs has the block device of each.
    pub devices: Vec<(String, PathBuf)>,
    /// How many hugepages of how many bytes the pool takes; 0 for none.
    pub pages: (u64, u64),
}

struct Nodes<'a> {
    sys: &'a Path,
    online: Vec<u32>,
}

impl<'a> Nodes<'a> {
    fn of(sys: &'a Path) -> Self {
        let list = read(sys.join("devices/system/node/online")).unwrap_or_default();
        // As `is_in`: nobody has more nodes.
        Self { sys, online: (0..1024).filter(|node| is_in(&list, *node)).collect() }
    }

    fn dir(&self, node: u32) -> PathBuf {
        self.sys.join(format!("devices/system/node/node{node}"))
    }

    fn cpus(&self, node: u32) -> String {
        read(self.dir(node).join("cpulist")).unwrap_or_default()
    }

    fn of_cpu(&self, cpu: u32) -> Option<u32> {
        self.online.iter().copied().find(|node| is_in(&self.cpus(*node), cpu))
    }

    /// A core for the shard: the first that the kernel leaves alone, or the last, since the first has interrupts.
    fn core_on(&self, node: u32) -> Option<u32> {
        let isolated = read(self.sys.join("devices/system/cpu/isolated")).unwrap_or_default();
        let cpus = self.cpus(node);
        let mut cores = (0..8192).filter(|cpu| is_in(&cpus, *cpu));
        let first_isolated = cores.clone().find(|cpu| is_in(&isolated, *cpu));
        first_isolated.or_else(|| cores.next_back())
    }

    fn pages(&self, node: u32, page_bytes: u64, file: &str) -> u64 {
        let path = self.dir(node).join(format!("hugepages/hugepages-{}kB/{file}", page_bytes >> 10));
        read(path).and_then(|text| text.parse().ok()).unwrap_or(0)
    }
}

/// The node of a device: its own, or that of the bus that it hangs on.
fn of_device(path: &Path) -> Option<u32> {
    path.ancestors().find_map(|at| read(at.join("numa_node")))?.parse().ok()
}

/// The node that all of these are on, if they are on one.
fn common<'a>(mut nodes: impl Iterator<Item = &'a u32>) -> Option<u32> {
    let first = *nodes.next()?;
    nodes.all(|node| *node == first).then_some(first)
}

pub fn look(report: &mut Report, sys: &Path, wanted: &Wanted) {
    let nodes = Nodes::of(sys);
    if nodes.online.len() < 2 {
        return report.ok("numa", "one node");
    }
    let gpus: Vec<(String, u32)> =
        gpu::gpus(sys).into_iter().filter_map(|(address, node)| Some((address, node?))).collect();
    let ssds: Vec<(&str, u32)> =
        wanted.devices.iter().filter_map(|(name, path)| Some((name.as_str(), of_device(path)?))).collect();
    let of_gpus = common(gpus.iter().map(|(_, node)| node));
    let of_ssds = common(ssds.iter().map(|(_, node)| node));
    let shard = wanted.cpu.and_then(|cpu| nodes.of_cpu(cpu));
    // Each block crosses from the SSD into the pool, and from there to a GPU: the devices say where the pool should be.
    let best = of_ssds.or(of_gpus).or(shard);
    let at = |node: u32| {
        format!("server_cpu = {}", nodes.core_on(node).map_or_else(|| "none".into(), |cpu| cpu.to_string()))
    };
    match (wanted.cpu, shard) {
        (Some(cpu), Some(shard)) => {
            let far: Vec<_> = ssds.iter().filter(|(_, node)| *node != shard).collect();
            for (name, node) in &far {
                let found = format!(
                    "server_cpu = {cpu} is on node {shard} and the SSD of {name} on node {node}: every completion crosses"
                );
                match of_ssds {
                    Some(all) => report.bad("numa", Level::Warning, found, at(all)),
                    None => report.advise("numa", found, "SSDs of one node for ssd_cache_dir"),
                }
            }
            if far.is_empty() && !ssds.is_empty() {
                report.ok("numa", format!("server_cpu and the SSDs are on node {shard}"));
            }
        }
        _ => {
            if let Some(best) = best {
                let what = if of_ssds.is_some() { "SSDs" } else { "GPUs" };
                report.advise("numa", format!("the {what} are on node {best}, and the shard runs anywhere"), at(best));
            }
        }
    }
    let names = |of: u32| {
        gpus.iter().filter(|(_, node)| *node == of).map(|(address, _)| address.as_str()).collect::<Vec<_>>().join(", ")
    };
    match (of_gpus, shard.or(of_ssds)) {
        (Some(of_gpus), Some(shard)) if of_gpus != shard => {
            let found = format!(
                "GPUs {} are on node {of_gpus}, server_cpu or the SSDs on node {shard}: every copy crosses",
                names(of_gpus)
            );
            let remedy = if of_ssds == Some(shard) {
                format!("an SSD of node {of_gpus} for ssd_cache_dir, and {}", at(of_gpus))
            } else {
                at(of_gpus)
            };
            report.bad("numa", Level::Warning, found, remedy);
        }
        (Some(of_gpus), _) => report.ok("numa", format!("GPUs {} are on node {of_gpus}", names(of_gpus))),
        (None, _) if !gpus.is_empty() => {
            let each = nodes.online.iter().filter(|node| !names(**node).is_empty());
            let each: Vec<String> = each.map(|node| format!("node {node}: {}", names(*node))).collect();
            report.note("numa", format!("GPUs on several nodes, some of them far from the pool: {}", each.join("; ")));
        }
        (None, _) => {}
    }
    look_at_pages(report, &nodes, wanted.pages, shard.or(best));
}

/// Hugepages that are enough in all and not on any one node put the pool on several.
fn look_at_pages(report: &mut Report, nodes: &Nodes<'_>, (needed, page_bytes): (u64, u64), best: Option<u32>) {
    if needed == 0 {
        return;
    }
    let free = |node: u32| nodes.pages(node, page_bytes, "free_hugepages");
    let told: Vec<String> = nodes.online.iter().map(|node| format!("{} on node {node}", free(*node))).collect();
    let told = format!("free hugepages of {} KiB: {}", page_bytes >> 10, told.join(", "));
    let all: u64 = nodes.online.iter().map(|node| free(*node)).sum();
    let Some(best) = best.or_else(|| nodes.online.iter().copied().max_by_key(|node| free(*node))) else { return };
    // Too few in all is said where hugepages are.
    if free(best) >= needed || all < needed {
        return report.ok("numa", told);
    }
    let make = nodes.pages(best, page_bytes, "nr_hugepages") + needed - free(best);
    let file = format!("/sys/devices/system/node/node{best}/hugepages/hugepages-{}kB/nr_hugepages", page_bytes >> 10);
    let found = format!("{told}; the pool takes {needed}, and not all of it will lie on node {best}");
    let remedy = format!("echo {make} > {file}; numactl --membind={best} kvring serve");
    report.bad("numa", Level::Warning, found, remedy);
}

#[cfg(test)]
mod test {
    use super::*;

    /// Two nodes of four CPUs, an SSD on the second, no GPU.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            machine.write("devices/system/node/online", "0-1");
            machine.write("devices/system/cpu/isolated", "6");
            for (node, cpus, free) in [(0, "0-3", "100"), (1, "4-7", "50")] {
                machine.write(&format!("devices/system/node/node{node}/cpulist"), cpus);
                for file in ["free_hugepages", "nr_hugepages"] {
                    machine.write(&format!("devices/system/node/node{node}/hugepages/hugepages-2048kB/{file}"), free);
                }
            }
            machine.write("devices/pci0000:80/0000:80:01.0/numa_node", "1");
            machine.write("devices/pci0000:80/0000:80:01.0/nvme/nvme0/nvme0n1/queue/scheduler", "[none]");
            machine.write("devices/virtual/block/zram0/queue/scheduler", "[none]");
            machine
        }
        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{text}\n")).unwrap();
        }
        fn gpu(&self, address: &str, node: i32) {
            crate::doctor::pci::test::device(self.0.path(), address, "0x030200", "0x10de", node);
        }
        fn seen(&self, cpu: Option<u32>, pages: u64) -> Vec<(Level, String, String)> {
            let ssd = self.0.path().join("devices/pci0000:80/0000:80:01.0/nvme/nvme0/nvme0n1");
            let zram = self.0.path().join("devices/virtual/block/zram0");
            let devices = vec![("/ssd".to_owned(), ssd), ("/zram".to_owned(), zram)];
            let mut report = Report::default();
            look(&mut report, self.0.path(), &Wanted { cpu, devices, pages: (pages, 2 << 20) });
            report.findings.into_iter().map(|f| (f.level, f.found, f.remedy.unwrap_or_default())).collect()
        }
    }

    #[test]
    fn a_shard_far_from_its_ssd_is_told_a_core_that_is_near() {
        let machine = Machine::new();
        let seen = machine.seen(Some(2), 0);
        let [(Level::Warning, found, remedy)] = &seen[..] else { panic!("{seen:?}") };
        assert!(found.contains("server_cpu = 2 is on node 0 and the SSD of /ssd on node 1"), "{found}");
        assert_eq!(remedy, "server_cpu = 6", "the isolated one of node 1");
        let near = machine.seen(Some(5), 0);
        assert!(matches!(&near[..], [(Level::Ok, _, _)]), "{near:?}");
        let anywhere = machine.seen(None, 0);
        assert!(matches!(&anywhere[..], [(Level::Note, _, remedy)] if remedy == "server_cpu = 6"), "{anywhere:?}");
        machine.write("devices/system/node/online", "0");
        assert_eq!(machine.seen(Some(2), 0)[0].1, "one node");
    }

    #[test]
    fn gpus_near_far_and_everywhere() {
        let machine = Machine::new();
        machine.gpu("0000:3b:00.0", 1);
        machine.gpu("0000:5e:00.0", -1);
        let near = machine.seen(Some(5), 0);
        assert!(near.iter().all(|(level, ..)| *level == Level::Ok), "{near:?}");
        let far = machine.seen(Some(2), 0);
        assert!(far[1].1.contains("GPUs 0000:3b:00.0 are on node 1") && far[1].2 == "server_cpu = 6", "{far:?}");
        machine.gpu("0000:1b:00.0", 0);
        let several = machine.seen(Some(5), 0);
        assert!(several[1].1.contains("node 0: 0000:1b:00.0; node 1: 0000:3b:00.0"), "{several:?}");
    }

    #[test]
    fn hugepages_that_are_not_on_the_node_where_they_are_wanted() {
        let machine = Machine::new();
        let enough = machine.seen(Some(5), 50);
        assert!(enough[1].1.contains("100 on node 0, 50 on node 1") && enough[1].0 == Level::Ok, "{enough:?}");
        let elsewhere = machine.seen(Some(5), 60);
        assert_eq!(elsewhere[1].0, Level::Warning);
        let file = "/sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages";
        assert_eq!(elsewhere[1].2, format!("echo 60 > {file}; numactl --membind=1 kvring serve"));
        let too_few = machine.seen(Some(5), 1000);
        assert_eq!(too_few[1].0, Level::Ok, "that is another check's to say");
    }
}
