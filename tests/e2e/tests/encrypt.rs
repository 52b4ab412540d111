//! `vm encrypt` and `vm decrypt`, raw and qcow2, killed at every step of the journal: bytes equal, the old file gone
//! when asked, nothing half-done. The agent of this test is built with fail points; it aborts where it is told to.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use vmseal_e2e::{
    domain::Guest,
    house::{House, items},
    lab::Lab,
    rounds, shell,
};
use vmseal_model::task::{DecryptStep, EncryptStep};

/// Image sizes: 1 GiB only in a soak.
fn sizes() -> &'static [&'static str] {
    &["64M", "1G"][..rounds(1, 2)]
}

fn word<T: serde::Serialize>(step: T) -> String {
    serde_json::to_value(step).expect("a step is a word").as_str().expect("a step is a word").to_owned()
}

/// The disk's content as QEMU reads it.
fn content(format: &str, image: &Path) -> String {
    let raw = image.with_extension("content");
    shell::must(shell::tool("qemu-img").args(["convert", "-f", format, "-O", "raw"]).arg(image).arg(&raw));
    let hash = shell::must(shell::tool("sha256sum").arg(&raw)).stdout;
    fs::remove_file(&raw).unwrap();
    hash.split_whitespace().next().unwrap_or("").to_owned()
}

fn fill(format: &str, image: &Path, size: &str) {
    let raw = image.with_extension("filling");
    let bytes =
        if size == "1G" { 1024 } else { size.trim_end_matches('M').parse::<u32>().expect("a size in MiB") };
    shell::must(
        shell::tool("dd")
            .args(["if=/dev/urandom", "bs=1M", "status=none"])
            .arg(format!("count={bytes}"))
            .arg(format!("of={}", raw.display())),
    );
    shell::must(
        shell::tool("qemu-img").args(["convert", "-n", "-f", "raw", "-O", format]).arg(&raw).arg(image),
    );
    fs::remove_file(&raw).unwrap();
}

/// States of the tasks that are not over, and of the newest one.
fn tasks(house: &House) -> (usize, String) {
    let tasks = house.json(&["task", "list"]);
    let state = |t: &serde_json::Value| t["state"].as_str().unwrap_or_default().to_owned();
    let newest = items(&tasks).iter().max_by_key(|t| t["created_ms"].as_i64());
    let over = |t: &&serde_json::Value| matches!(&*state(t), "succeeded" | "failed" | "cancelled");
    let unfinished = items(&tasks).len() - items(&tasks).iter().filter(over).count();
    (unfinished, newest.map(state).unwrap_or_default())
}

/// Sends the command with a fail point armed, waits for the agent's death there, starts it without, waits for the end.
fn killed_at(house: &mut House, args: &[&str], point: &str) {
    house.kill_agent();
    house.start_agent_failing_at(point);
    let mut all = args.to_vec();
    all.push("--no-wait");
    house.must_vmseal(&all);
    assert!(house.wait_agent_died(Duration::from_secs(120)), "the agent did not reach {point}");
    house.start_agent();
    shell::until(&format!("the task killed at {point} ends"), Duration::from_secs(300), || {
        tasks(house).0 == 0
    });
    assert_eq!(tasks(house).1, "succeeded", "killed at {point}");
}

#[test]
fn encrypt_and_decrypt_survive_a_kill_at_every_step() {
    let mut house = House::start(Lab::for_test("journal"));
    let mut counts = (0, 0);
    for &size in sizes() {
        for format in ["raw", "qcow2"] {
            let name = format!("vm-{format}-{size}").to_lowercase();
            let guest = house.guest(&name, &[("vda", size, format)]);
            let image = guest.disks[0].1.clone();
            fill(format, &image, size);
            house.define(&guest);
            let original = content(format, &image);
            let points: Vec<(String, String)> = steps();
            // In the small run each format takes every second point, so that each point is met once.
            let all = rounds(0, 1) == 1;
            for (i, (encrypt, decrypt)) in points.iter().enumerate() {
                if !all && (i % 2 == 0) != (format == "raw") {
                    continue;
                }
                if !encrypt.is_empty() {
                    killed_at(&mut house, &["vm", "encrypt", &name], encrypt);
                    check_encrypted(&house, &guest, encrypt);
                    counts.0 += 1;
                } else {
                    house.must_vmseal(&["vm", "encrypt", &name]);
                }
                if !decrypt.is_empty() {
                    killed_at(&mut house, &["vm", "decrypt", &name], decrypt);
                    counts.1 += 1;
                } else {
                    house.must_vmseal(&["vm", "decrypt", &name]);
                }
                let clear = clear_image(&house, &name);
                assert_eq!(content(format, &clear), original, "content after {encrypt} and {decrypt}");
                assert!(
                    !volume(&image).exists() && !volume(&clear).exists(),
                    "a volume is left after {decrypt}"
                );
            }
        }
    }
    println!("killed at {} points of encrypt and {} of decrypt, every content equal", counts.0, counts.1);
}

/// Every point, of both journals side by side: before and after each step's entry, in the middle of a copy, between
/// overwriting and deleting, before the last entry.
fn steps() -> Vec<(String, String)> {
    let points = |task: &str, steps: Vec<String>| {
        let around = steps.into_iter().flat_map(|s| [format!("{s}:before"), format!("{s}:after")]);
        let within = ["copied:progress", "source-gone:overwritten", "finished:before"].map(str::to_owned);
        around.chain(within).map(|point| format!("{task}:{point}")).collect::<Vec<_>>()
    };
    let encrypt = points("encrypt", EncryptStep::ALL.into_iter().map(word).collect());
    let decrypt = points("decrypt", DecryptStep::ALL.into_iter().map(word).collect());
    let longest = encrypt.len().max(decrypt.len());
    (0..longest)
        .map(|i| (encrypt.get(i).cloned().unwrap_or_default(), decrypt.get(i).cloned().unwrap_or_default()))
        .collect()
}

fn volume(image: &Path) -> PathBuf {
    PathBuf::from(format!("{}.vmseal", image.display()))
}

/// The file that the domain's definition names.
fn clear_image(house: &House, name: &str) -> PathBuf {
    let list = house.libvirtd.must_virsh(&["domblklist", name, "--details"]);
    let path = list.lines().find(|l| l.contains("vda")).and_then(|l| l.split_whitespace().nth(3));
    PathBuf::from(path.unwrap_or_else(|| panic!("no vda in {list}")))
}

fn check_encrypted(house: &House, guest: &Guest, point: &str) {
    let shown = house.json(&["vm", "show", &guest.name]);
    assert_eq!(shown["coverage"], "encrypted", "after {point}: {shown}");
    let xml = house.libvirtd.must_virsh(&["dumpxml", &guest.name, "--inactive"]);
    assert!(xml.contains("protocol='nbd'"), "after {point}");
    let folder = house.lab.state.join("images");
    let left: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with(&guest.name) && !n.ends_with(".vmseal"))
        .collect();
    assert!(left.is_empty(), "after {point} these clear files are left: {left:?}");
}

#[test]
fn every_refusal_names_the_way_out_and_changes_nothing() {
    let house = House::start(Lab::for_test("refusals"));
    let guest = house.guest("web01", &[("vda", "8M", "qcow2")]);
    house.define(&guest);
    let refuse = |words: &[&str], args: &[&str]| {
        let outcome = house.vmseal(args);
        assert!(matches!(outcome.code(), 3), "{args:?} gave {}: {}", outcome.code(), outcome.all());
        for word in words {
            assert!(outcome.stderr.contains(word), "'{word}' is not in: {}", outcome.stderr);
        }
        assert!(outcome.stderr.contains("hint:"), "{}", outcome.stderr);
        assert!(!volume(&guest.disks[0].1).exists());
    };
    let encrypt = ["vm", "encrypt", "web01"];

    let mut console = house.boot(&guest);
    refuse(&["running", "virsh shutdown web01"], &encrypt);
    house.libvirtd.must_virsh(&["managedsave", "web01"]);
    refuse(&["saved image", "managedsave-remove"], &encrypt);
    house.libvirtd.must_virsh(&["managedsave-remove", "web01"]);
    house.libvirtd.must_virsh(&["snapshot-create-as", "web01", "one"]);
    refuse(&["snapshot", "snapshot-delete"], &encrypt);
    house.libvirtd.must_virsh(&["snapshot-delete", "web01", "one"]);
    let _ = &mut console;

    // A backing chain.
    let chain = house.guest("chain", &[]);
    let overlay = house.lab.state.join("images/overlay.qcow2");
    shell::must(
        shell::tool("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(&guest.disks[0].1)
            .arg(&overlay),
    );
    let chain = Guest { disks: vec![("vda".into(), overlay.clone(), "qcow2".into())], ..chain };
    house.define(&chain);
    refuse(&["backing", "qemu-img"], &["vm", "encrypt", "chain"]);

    house.libvirtd.must_virsh(&["undefine", "chain"]);

    // The image of another domain too.
    let twin = Guest { name: "twin".into(), ..guest.clone() };
    house.define(&twin);
    refuse(&["twin"], &encrypt);
    house.libvirtd.must_virsh(&["undefine", "twin"]);
    let unknown = house.vmseal(&["vm", "encrypt", "web01", "--disk", "vdz"]);
    assert!(unknown.code() == 3 || unknown.code() == 1, "{}", unknown.code());
    assert!(unknown.stderr.contains("no disk vdz; it has: vda"), "{}", unknown.stderr);

    // Asked to keep the clear file, it does, for nobody but root.
    house.must_vmseal(&["vm", "encrypt", "web01", "--keep-source"]);
    let kept = fs::metadata(&guest.disks[0].1).expect("the clear file is kept");
    assert_eq!(kept.permissions().mode() & 0o777, 0o600);
    let again = house.vmseal(&encrypt);
    assert_eq!(again.code(), 3, "{}", again.all());
}
