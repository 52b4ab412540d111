//! `vm adopt` of a VM whose definition was copied under another UUID.

use vmseal_model::{id::DomainUuid, refusal::Code, state::VmState, task::SourceFate};

use super::lab::*;
use crate::{
    adopt::adopt,
    config::AgentConfig,
    domain_xml::DomainXml,
    ports::{Definition, Hypervisor},
    start::plan::plan,
    tasks::Refusal,
};

const COPY: DomainUuid = DomainUuid::from_bytes([0xc0; 16]);

/// An encrypted VM and a copy of its definition under another name and UUID.
fn copied() -> Lab {
    let mut lab = Lab::new();
    let raw = lab.raw_image("a.img", 100_000);
    lab.define(&[("vda", &raw, "raw")]);
    lab.run(encrypt(&[], SourceFate::Keep));
    let xml = lab.libvirt.xml(DOMAIN, Definition::Persistent).unwrap();
    let uuid = |domain: DomainUuid| format!("<uuid>{domain}</uuid>");
    let xml = xml.replace(&uuid(DOMAIN), &uuid(COPY)).replace("<name>web01</name>", "<name>web02</name>");
    lab.libvirt.put_xml(COPY, "web02", &xml);
    lab
}

fn config() -> AgentConfig {
    AgentConfig { run_dir: "/run/vmseal".into(), ..AgentConfig::default() }
}

fn adopted(lab: &Lab) -> Result<String, Refusal> {
    adopt(&*lab.libvirt, &config(), &lab.store(), COPY)
}

fn copy(lab: &Lab) -> DomainXml {
    DomainXml::parse(&lab.libvirt.xml(COPY, Definition::Persistent).unwrap()).unwrap()
}

#[test]
fn copy_becomes_the_vm_once_the_original_is_gone() {
    let lab = copied();
    let vm = lab.store().vm_of_domain(DOMAIN).unwrap();
    assert_eq!(plan(&copy(&lab), &config(), &lab.store()).unwrap_err().code, Code::UnknownVm);
    let before = copy(&lab).to_xml();
    let refused = adopted(&lab).unwrap_err();
    assert_eq!(refused.code, Code::Conflict);
    assert!(refused.message.contains("web01") && refused.hint.contains("undefine web01"), "{refused:?}");
    assert_eq!((copy(&lab).to_xml(), lab.store().domain_of_vm(vm)), (before, Some(DOMAIN)));

    lab.libvirt.undefine(DOMAIN);
    adopted(&lab).unwrap();
    let planned = plan(&copy(&lab), &config(), &lab.store()).unwrap().unwrap();
    assert_eq!((planned.vm, planned.domain, planned.bound), (vm, COPY, true));
}

#[test]
fn adopting_that_was_cut_short_is_finished_by_doing_it_again() {
    for trouble in [Trouble::LostBefore, Trouble::LostAfter] {
        let lab = copied();
        lab.libvirt.undefine(DOMAIN);
        lab.libvirt.defines.lock().unwrap().push_back(trouble);
        adopted(&lab).unwrap_err();
        adopted(&lab).unwrap();
        assert!(plan(&copy(&lab), &config(), &lab.store()).unwrap().is_some());
    }
}

#[test]
fn disk_of_ours_that_nobody_knows_keeps_the_vm_from_being_adopted() {
    let lab = copied();
    lab.libvirt.undefine(DOMAIN);
    let vdb = format!(
        "<disk type='vhostuser' device='disk'><source type='unix' path='/run/vmseal/libvirt-{DOMAIN}/vdb.sock'/>\
         <target dev='vdb' bus='virtio'/></disk></devices>"
    );
    lab.libvirt.change(COPY, |_, xml| *xml = xml.replace("</devices>", &vdb));
    let before = copy(&lab).to_xml();
    let refused = adopted(&lab).unwrap_err();
    assert_eq!(refused.code, Code::UnknownVm);
    assert!(refused.message.contains("disk vdb of 'web02'"), "{refused:?}");
    assert_eq!((copy(&lab).to_xml(), lab.store().vm_of_domain(COPY)), (before, None));
}

#[test]
fn vm_that_runs_or_is_clear_is_not_adopted() {
    let lab = copied();
    lab.libvirt.undefine(DOMAIN);
    lab.libvirt.change(COPY, |info, _| info.state = VmState::Running);
    assert_eq!(adopted(&lab).unwrap_err().code, Code::VmRunning);
    lab.libvirt.put(COPY, "web02", &[("vda", "/x/clear.img", "raw")]);
    assert_eq!(adopted(&lab).unwrap_err().code, Code::NothingToDo);
}
