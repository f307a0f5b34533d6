//! A machine in QEMU with emulated NVMe controllers: what the host has none of. Installed from Debian packages by name;
//! everything is made under `target/guest`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Outcome, cargo, program, root, step};

/// A run takes a minute on two idle cores; the counts of `cpu` take ten.
const TIME_MAX: Duration = Duration::from_secs(420);
const COUNTS_TIME_MAX: Duration = Duration::from_secs(1200);

/// Runs the stories of `tests/guest`, or those of one file of it.
pub fn guest(only: Option<&str>) -> Outcome {
    install()?;
    let (kernel, modules) = kernel()?;
    step("the program", &mut program())?;
    let suite = suite()?;
    let initrd = initrd(&modules, &suite, only == Some("cpu"))?;
    if let Some(only) = only {
        return boot(&kernel, &initrd, only);
    }
    boot(&kernel, &initrd, "stories")?;
    if spdk().is_none() {
        println!("skipped: SPDK over PCIe: there is no target/spdk/libkvring_spdk.so (cargo xtask spdk)");
        return Ok(());
    }
    boot(&kernel, &initrd, "vfio")?;
    boot(&kernel, &initrd, "uio")
}

/// In the order in which they are needed.
const MODULES: [&str; 9] = [
    "fs/configfs/configfs.ko",
    "drivers/block/null_blk/null_blk.ko",
    "virt/lib/irqbypass.ko",
    "drivers/vfio/vfio.ko",
    "drivers/vfio/vfio_iommu_type1.ko",
    "drivers/vfio/pci/vfio-pci-core.ko",
    "drivers/vfio/pci/vfio-pci.ko",
    "drivers/uio/uio.ko",
    "drivers/uio/uio_pci_generic.ko",
];

/// SPDK, where somebody has made it (`cargo xtask spdk`): then it drives a controller as well.
fn spdk() -> Option<PathBuf> {
    Some(root().join("target/spdk/libkvring_spdk.so")).filter(|library| library.is_file())
}

fn place() -> PathBuf {
    root().join("target/guest")
}

/// What a program says, or why it could not.
fn told(command: &mut Command) -> Outcome<String> {
    let what = command.get_program().to_string_lossy().into_owned();
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| format!("{what}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(text) } else { Err(format!("{what}: {}: {text}", output.status)) }
}

fn io<T>(path: &Path, result: std::io::Result<T>) -> Outcome<T> {
    result.map_err(|error| format!("{}: {error}", path.display()))
}

fn install() -> Outcome {
    let has = |program: &str| Command::new(program).arg("--help").output().is_ok();
    if has("qemu-system-x86_64") && has("busybox") {
        return Ok(());
    }
    let packages = ["install", "--yes", "--no-install-recommends", "qemu-system-x86", "busybox-static"];
    step("packages: qemu-system-x86, busybox-static", Command::new("apt-get").args(packages))
        .map_err(|error| format!("{error}: install qemu-system-x86 and busybox-static as root"))
}

/// Debian's kernel for clouds, which has NVMe and ext4 built in, and its modules: unpacked, not installed. The newest that
/// this release of Debian may run: NVMe commands are polled for without danger from 6.5 on, and take a pool's registered
/// memory from 6.12 on.
fn kernel() -> Outcome<(PathBuf, PathBuf)> {
    let found = |place: &Path| {
        let boot = fs::read_dir(place.join("boot")).ok()?;
        let kernel = boot.flatten().map(|file| file.path()).find(|path| path.to_string_lossy().contains("vmlinuz"))?;
        let version = kernel.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned();
        let modules = ["lib/modules", "usr/lib/modules"].map(|lib| place.join(lib).join(&version).join("kernel"));
        Some((kernel, modules.into_iter().find(|modules| modules.is_dir())?))
    };
    let unpacked = place().join("kernel");
    if let Some(found) = found(&unpacked) {
        return Ok(found);
    }
    io(&unpacked, fs::create_dir_all(&unpacked))?;
    let options = backports()?;
    let apt = |program: &str, arguments: &[&str]| {
        told(Command::new(program).args(&options).args(arguments).current_dir(place()))
    };
    apt("apt-get", &["--quiet", "update"])?;
    let depends = apt("apt-cache", &["depends", "linux-image-cloud-amd64"])?;
    let package = depends
        .split_whitespace()
        .find(|word| word.starts_with("linux-image-") && *word != "linux-image-cloud-amd64")
        .ok_or("apt-cache knows no linux-image-cloud-amd64")?;
    println!("── the kernel: {package}");
    apt("apt-get", &["download", package])?;
    let archive = io(&place(), fs::read_dir(place()))?.flatten().map(|file| file.path());
    let archive = archive.filter(|path| path.extension().is_some_and(|extension| extension == "deb")).last();
    let archive = archive.ok_or("apt-get download has left nothing")?;
    told(Command::new("dpkg").arg("-x").arg(&archive).arg(&unpacked))?;
    io(&archive, fs::remove_file(&archive))?;
    found(&unpacked).ok_or_else(|| format!("{package} has no kernel as it is known"))
}

/// Has apt look at the backports to this release, from where the release itself comes, without touching its own lists.
fn backports() -> Outcome<[String; 4]> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.ok_or("/etc/os-release names no release of Debian")?.trim_matches('"');
    let targets = told(Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI) $(CODENAME)"]))?;
    let from = targets.lines().filter_map(|line| line.split_once(' ')).find(|(_, of)| *of == codename);
    let (uri, _) = from.ok_or_else(|| format!("apt knows no source of {codename}: run apt-get update"))?;
    let apt = place().join("apt");
    for dir in ["lists/partial", "cache/archives/partial"] {
        io(&apt, fs::create_dir_all(apt.join(dir)))?;
    }
    let list = apt.join("sources.list");
    io(&list, fs::write(&list, format!("deb {uri} {codename}-backports main\n")))?;
    Ok([
        format!("-oDir::Etc::SourceList={}", list.display()),
        "-oDir::Etc::SourceParts=/dev/null".into(),
        format!("-oDir::State::Lists={}", apt.join("lists").display()),
        format!("-oDir::Cache={}", apt.join("cache").display()),
    ])
}

/// The conformance suite, as `cargo test` builds it: with all others, or their packages would be compiled again.
fn suite() -> Outcome<PathBuf> {
    let arguments = ["test", "--no-run", "--workspace", "--exclude", "xtask", "--message-format", "json"];
    let messages = told(&mut *cargo(&arguments).current_dir(root()))?;
    let of_suite = messages.lines().filter(|line| line.contains(r#""name":"devices""#));
    let executable = of_suite.filter_map(|line| line.split_once("\"executable\":\"")).next_back();
    let path = executable.and_then(|(_, rest)| rest.split('"').next());
    path.map(PathBuf::from).ok_or_else(|| "cargo has built no suite".into())
}

/// A file system in memory: busybox, the programs with their libraries, the stories.
fn initrd(modules: &Path, suite: &Path, counts: bool) -> Outcome<PathBuf> {
    let tree = place().join("root");
    let _ = fs::remove_dir_all(&tree);
    for dir in ["bin", "modules", "etc"] {
        io(&tree, fs::create_dir_all(tree.join(dir)))?;
    }
    let copy = |from: &Path, to: &str| io(from, fs::copy(from, tree.join(to)).map(drop));
    let busybox = told(Command::new("sh").args(["-c", "command -v busybox"]))?;
    copy(Path::new(busybox.trim()), "bin/busybox")?;
    for name in ["init", "stories", "pci", "vfio", "uio", "cpu"] {
        copy(&root().join("tests/guest").join(name), name)?;
    }
    for module in MODULES {
        let module = modules.join(module);
        let to = tree.join("modules").join(module.file_name().unwrap_or_default());
        let packed = module.with_extension("ko.xz");
        if packed.is_file() {
            let unpack = Command::new("busybox").arg("xzcat").arg(&packed).stderr(Stdio::inherit()).output();
            io(&to, fs::write(&to, io(&packed, unpack)?.stdout))?;
        } else {
            io(&module, fs::copy(&module, &to).map(drop))?;
        }
    }
    let mut programs = vec![(root().join("target/release/kvring"), "kvring"), (suite.to_path_buf(), "devices")];
    let fake = suite.with_file_name("libkvring_fake_spdk.so");
    let fake =
        if fake.is_file() { fake } else { suite.ancestors().nth(2).unwrap_or(suite).join("libkvring_fake_spdk.so") };
    programs.push((fake, "libkvring_fake_spdk.so"));
    if let Some(library) = spdk() {
        programs.push((library, "libkvring_spdk.so"));
    }
    if counts {
        // Of the host, which has to have them.
        let callgrind = Path::new("/usr/libexec/valgrind/callgrind-amd64-linux");
        io(&tree, fs::create_dir_all(tree.join("usr/libexec/valgrind")))?;
        copy(callgrind, "usr/libexec/valgrind/callgrind-amd64-linux")?;
        for preload in ["core", "callgrind"].map(|of| format!("usr/libexec/valgrind/vgpreload_{of}-amd64-linux.so")) {
            let from = Path::new("/").join(&preload);
            if from.is_file() {
                copy(&from, &preload)?;
            }
        }
        copy(&root().join("tests/fio/instructions.sh"), "instructions.sh")?;
        let valgrind =
            ["/usr/bin/valgrind.bin", "/usr/bin/valgrind"].into_iter().find(|path| Path::new(path).is_file());
        programs.push((valgrind.ok_or("install valgrind")?.into(), "valgrind"));
        programs.push(("/usr/bin/fio".into(), "fio"));
    }
    for (program, name) in programs {
        let to = tree.join("bin").join(name);
        told(Command::new("strip").arg("-o").arg(&to).arg(&program))?;
        // "name => /path (address)", and the loader by its path alone.
        let needed = told(Command::new("ldd").arg(&program))?;
        for library in needed.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new) {
            let to = tree.join(library.strip_prefix("/").unwrap_or(library));
            io(&to, fs::create_dir_all(to.parent().unwrap_or(&tree)))?;
            io(library, fs::copy(library, &to).map(drop))?;
        }
    }
    // SPDK's OpenSSL does not begin without its configuration.
    let openssl = Path::new("/usr/lib/ssl/openssl.cnf");
    if spdk().is_some() && openssl.is_file() {
        io(&tree, fs::create_dir_all(tree.join("usr/lib/ssl")))?;
        copy(openssl, "usr/lib/ssl/openssl.cnf")?;
    }
    let scratch = suite.ancestors().nth(3).unwrap_or(Path::new("/")).join("tmp");
    io(&tree, fs::write(tree.join("tmpdir"), scratch.display().to_string()))?;
    io(&tree, fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755)))?;
    io(&tree, symlink("busybox", tree.join("bin/sh")))?;
    let archive = place().join("initrd.cpio");
    let pack = format!("find . | busybox cpio -o -H newc > {}", archive.display());
    told(Command::new("sh").args(["-c", &pack]).current_dir(&tree))?;
    Ok(archive)
}

/// Boots, shows what is said, and believes it only if all was well.
fn boot(kernel: &Path, initrd: &Path, stories: &str) -> Outcome {
    const DRIVES: [(&str, u64, &str); 4] = [
        ("nv0", 512 << 20, "serial=nv0,drive=nv0"),
        ("nv1", 512 << 20, "serial=nv1,drive=nv1,mdts=4,logical_block_size=4096,physical_block_size=4096"),
        ("nv2", 256 << 20, "serial=nv2,drive=nv2"),
        ("nv3", 320 << 20, "serial=nv3,drive=nv3,addr=10.0"),
    ];
    let mut qemu = Command::new("qemu-system-x86_64");
    // QEMU 7.2's CMPXCHG16B is not what the allocator of newer kernels takes it for: seven of eight boots of 6.12 ended in
    // a corrupted list, and with it off none of eight.
    qemu.args([
        "-machine",
        "q35,kernel-irqchip=split",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max,cx16=off",
        "-smp",
        "2",
        "-m",
        "2G",
    ]);
    qemu.args(["-no-reboot", "-nodefaults", "-display", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    // While one processor patches the kernel's text QEMU may have the other execute what was there in between ("Oops: int3",
    // one of five boots): almost all of that is done before the second one is there.
    let mut words = format!("console=ttyS0 panic=-1 quiet maxcpus=1 nvme.poll_queues=1 kvring.stories={stories}");
    if stories == "vfio" {
        // With fewer bits of address than 48 vfio maps nothing.
        qemu.args(["-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48"]);
        words += " intel_iommu=on iommu=pt";
    }
    qemu.args(["-append", &words]);
    for (name, bytes, device) in DRIVES {
        let path = place().join(format!("{name}.img"));
        let _ = fs::remove_file(&path);
        let file = io(&path, fs::File::create(&path))?;
        io(&path, file.set_len(bytes))?;
        // The host's page cache holds what was written: no disk here is as fast as a controller.
        qemu.args(["-drive", &format!("file={},if=none,id={name},format=raw", path.display())]);
        qemu.args(["-device", &format!("nvme,{device}")]);
    }
    println!("── guest");
    let time_max = if stories == "cpu" { COUNTS_TIME_MAX } else { TIME_MAX };
    let started = Instant::now();
    let mut child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("qemu-system-x86_64: {error}"))?;
    let output = child.stdout.take().ok_or("no output")?;
    let lines = std::thread::spawn(move || {
        let mut good = false;
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            println!("{line}");
            good |= line.starts_with("guest: [") && line.ends_with("all is well");
        }
        good
    });
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            break status;
        }
        if started.elapsed() > time_max {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("the guest has not ended after {} s", time_max.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let good = lines.join().map_err(|_| "the guest's output cannot be read")?;
    println!("── guest: {:.0} s", started.elapsed().as_secs_f64());
    if good && status.success() { Ok(()) } else { Err("the guest failed: why is above".into()) }
}
