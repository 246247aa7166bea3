//! Guests that run while their documents change, and what is kept across a crash.

use stackhand_model::VolumeId;

use super::*;
use crate::hypervisor::DomainChange;

const GUEST: Uuid = Uuid::from_u128(1 << 100);

fn volume(id: u128) -> Value {
    let connection = json!({"type": "file", "path": format!("/v/{id}"), "format": "raw"});
    json!({"volume": Uuid::from_u128(id), "connection": connection})
}

fn port(id: u128) -> Value {
    json!({"port": Uuid::from_u128(id << 88), "mac": format!("fa:16:3e:00:00:{id:02x}")})
}

/// A world in which volumes 1 to 5 are there, and taps of ports 1 and 2.
fn world() -> World {
    let mut world = running();
    world.situation.volumes = (1..6).map(|id| PathBuf::from(format!("/v/{id}"))).collect();
    for id in 1..3_u128 {
        let port = stackhand_model::PortId(Uuid::from_u128(id << 88));
        world.situation.links.insert(crate::domain::tap_name(port));
    }
    world
}

fn targets(world: &World) -> Vec<String> {
    let devices = &world.host.domains[&GUEST].devices;
    devices.volumes.values().map(|plugged| plugged.guest.clone()).collect()
}

fn is_active(plan: &Plan) -> bool {
    matches!(plan.outcomes[&only(1)], Outcome::Active { .. })
}

#[test]
fn devices_come_and_go_and_keep_their_names_while_the_guest_is_not_disturbed() {
    let mut world = world();
    let mark = world.host.domains[&GUEST].running_mark.clone();
    let both = json!({"volumes": [volume(1), volume(2)], "ports": [port(1)]});
    world.want(instance(1, 2, &both), false);
    assert!(is_active(&world.settle()));
    assert_eq!(targets(&world), ["vdb", "vdc"]);
    assert_eq!(world.host.domains[&GUEST].devices.nics.len(), 1);
    // The first goes, the second keeps its name; that of the first is not given away before the guest
    // has let go.
    world.want(instance(1, 3, &json!({"volumes": [volume(2), volume(3)]})), false);
    assert!(is_active(&world.settle()));
    assert_eq!(targets(&world), ["vdc", "vdd"]);
    assert_eq!(world.host.domains[&GUEST].running_mark, mark);
    // The definition for the next start is the same.
    world.host.change(InstanceId(GUEST), &DomainChange::Destroy).unwrap();
    world.host.change(InstanceId(GUEST), &DomainChange::Start { paused: false }).unwrap();
    assert_eq!(targets(&world), ["vdc", "vdd"]);
    assert!(world.settle().steps.is_empty());
}

#[test]
fn a_guest_that_clings_to_a_device_is_asked_again_when_its_time_is_up() {
    let mut world = world();
    world.want(instance(1, 2, &json!({"volumes": [volume(1)]})), false);
    world.settle();
    world.host.clinging.insert(GUEST);
    world.want(instance(1, 3, &json!({})), false);
    let asks = |plan: &Plan| {
        let detach = |step: &&Step| matches!(step, Step::Domain(DomainChange::Detach { .. }));
        plan.steps.values().flatten().filter(detach).count()
    };
    let plan = world.pass();
    assert_eq!(asks(&plan), 1);
    assert!(reason(&plan, only(1)).contains("let go of volume"), "{plan:?}");
    let alias = format!("disk-{}", Uuid::from_u128(1));
    let key = (InstanceId(GUEST), alias);
    world.situation.detaching.insert(key.clone(), false);
    assert_eq!(asks(&world.pass()), 0, "it has time");
    world.situation.detaching.insert(key, true);
    assert_eq!(asks(&world.pass()), 1);
    // Its name is not given away meanwhile.
    world.want(instance(1, 4, &json!({"volumes": [volume(2)]})), false);
    world.pass();
    assert_eq!(targets(&world), ["vdb", "vdc"]);
}

#[test]
fn what_is_not_there_yet_is_waited_for_and_the_rest_is_plugged_in() {
    let mut world = world();
    let wish = json!({"volumes": [volume(1), volume(9)], "ports": [port(1), port(7)]});
    world.want(instance(1, 2, &wish), false);
    let plan = world.settle();
    let reason = reason(&plan, only(1));
    assert!(reason.contains("there is no /v/9") && reason.contains("waits for tap"), "{reason}");
    assert_eq!(plan.awaited.len(), 1);
    assert_eq!(targets(&world), ["vdb"]);
    world.situation.volumes.insert("/v/9".into());
    let tap = plan.awaited.first().unwrap().clone();
    world.situation.links.insert(tap);
    assert!(is_active(&world.settle()));
    assert_eq!(targets(&world), ["vdb", "vdc"]);
}

#[test]
fn a_running_guest_is_told_once_that_a_volume_has_grown() {
    let mut world = world();
    let sized = |gib: u64| {
        let mut volume = volume(1);
        volume["size_gib"] = gib.into();
        json!({"volumes": [volume]})
    };
    world.want(instance(1, 2, &sized(1)), false);
    world.settle();
    let grows = |world: &mut World| {
        let plan = world.pass();
        let resize = |step: &&Step| matches!(step, Step::Domain(DomainChange::Resize { .. }));
        plan.steps.values().flatten().filter(resize).count()
    };
    assert_eq!(grows(&mut world), 0);
    world.want(instance(1, 3, &sized(2)), false);
    assert_eq!((grows(&mut world), grows(&mut world)), (1, 0));
    // One that could not be told is told again.
    world.want(instance(1, 4, &sized(3)), false);
    world.situation.domains = Ok(world.host.domains.clone());
    let wanted = Wanted::new(&world.wanted);
    let plan = Plan::new(&wanted, &world.situation, &world.due());
    let resize = |step: &&Step| !matches!(step, Step::Domain(DomainChange::Resize { .. }));
    for step in plan.steps[&only(1)].iter().take_while(resize) {
        world.perform(&wanted, Some(only(1)), step);
    }
    assert_eq!((grows(&mut world), grows(&mut world)), (1, 0));
    // One that starts sees the size by itself.
    world.host.change(InstanceId(GUEST), &DomainChange::Destroy).unwrap();
    world.want(instance(1, 5, &sized(4)), false);
    world.pass();
    assert_eq!(grows(&mut world), 0);
}

#[test]
fn a_volumes_password_is_given_before_it_is_opened_and_taken_back_after() {
    let mut world = world();
    let connection = json!({
        "type": "iscsi", "portal": "10.0.0.1:3260", "iqn": "iqn.2026-11.org.stackhand:volume-1",
        "lun": 1, "username": "u", "password": "p",
    });
    let wish = json!({"volumes": [{"volume": Uuid::from_u128(1), "connection": connection}]});
    world.want(instance(1, 2, &wish), false);
    let plan = world.pass();
    let steps = &plan.steps[&only(1)];
    let at = |wanted: fn(&Step) -> bool| steps.iter().position(wanted).unwrap();
    let keep = at(|step| matches!(step, Step::Domain(DomainChange::Keep { .. })));
    assert!(keep < at(|step| matches!(step, Step::Domain(DomainChange::Attach { .. }))));
    assert!(!format!("{plan:?}").contains("\"p\""), "a password is never printed");
    world.settle();
    world.want(instance(1, 3, &json!({})), false);
    world.pass();
    let plan = world.pass();
    let releases = |step: &Step| matches!(step, Step::Domain(DomainChange::Release { .. }));
    assert!(plan.steps.values().flatten().any(releases), "{plan:?}");
    assert!(world.settle().steps.is_empty());
}

#[test]
fn a_config_drive_is_written_once_and_anew_only_while_the_guest_is_off() {
    let mut world = world();
    let told = |role: &str, power: &str| json!({"config_drive": true, "guest": {"metadata": {"role": role}}, "power_state": power});
    let writes = |plan: &Plan| {
        plan.steps.values().flatten().filter(|step| **step == Step::WriteConfigDrive).count()
    };
    world.want(instance(2, 1, &told("web", "running")), false);
    let plan = world.pass();
    assert_eq!(writes(&plan), 1);
    world.settle();
    world.want(instance(2, 2, &told("db", "running")), false);
    assert_eq!(writes(&world.pass()), 0, "a running guest has the CD open");
    world.settle();
    world.want(instance(2, 3, &told("db", "shutoff")), false);
    let mut written = 0;
    world.situation.stopping.clear();
    for _ in 0..4 {
        written += writes(&world.pass());
        world.situation.stopping.values_mut().for_each(|up| *up = true);
    }
    assert_eq!(written, 1);
}

#[test]
fn a_guest_that_was_put_to_sleep_stays_asleep_and_goes_on_where_it_was() {
    let mut world = world();
    world.want(instance(1, 2, &json!({"power_state": "suspended"})), false);
    assert!(is_active(&world.settle()));
    let domain = &world.host.domains[&GUEST];
    assert!(domain.saved && domain.power.is_off());
    world.want(instance(1, 3, &json!({})), false);
    world.settle();
    assert_eq!(world.power(1 << 100), Power::Running);
    assert!(!world.host.domains[&GUEST].saved);
}

proptest! {
    #[test]
    fn a_rebuild_that_breaks_off_at_any_step_is_finished_by_the_next(cut in 0usize..8) {
        let mut world = running();
        let id = InstanceId(GUEST);
        let folder = world.situation.store.folders.get_mut(&id).unwrap();
        folder.record.as_mut().unwrap().rebuild = true;
        world.situation.domains = Ok(world.host.domains.clone());
        let wanted = Wanted::new(&world.wanted);
        let plan = Plan::new(&wanted, &world.situation, &world.due());
        let steps = &plan.steps[&only(1)];
        prop_assert!(steps.contains(&Step::RemovePart(Part::Root)));
        for step in steps.iter().take(cut) {
            world.perform(&wanted, Some(only(1)), step);
        }
        let plan = world.settle();
        prop_assert!(is_active(&plan), "{:?}", plan);
        prop_assert_eq!(world.power(1 << 100), Power::Running);
        let folder = &world.situation.store.folders[&id];
        prop_assert!(!folder.record.as_ref().unwrap().rebuild);
        prop_assert!(folder.parts.contains(&Part::Root));
    }

    #[test]
    fn devices_always_end_as_they_are_asked_for(
        wishes in proptest::collection::vec(
            (proptest::collection::btree_set(1u128..6, 0..4), proptest::collection::btree_set(1u128..3, 0..2)),
            1..6,
        ),
    ) {
        let mut world = world();
        for (index, (volumes, ports)) in wishes.into_iter().enumerate() {
            let generation = u64::try_from(index).unwrap() + 2;
            let fields = json!({
                "volumes": volumes.iter().map(|&id| volume(id)).collect::<Vec<_>>(),
                "ports": ports.iter().map(|&id| port(id)).collect::<Vec<_>>(),
            });
            world.want(instance(1, generation, &fields), false);
            let plan = world.settle();
            prop_assert!(is_active(&plan), "{:?}", plan);
            let devices = &world.host.domains[&GUEST].devices;
            let plugged: BTreeSet<u128> = devices.volumes.keys().map(|it| it.0.as_u128()).collect();
            prop_assert_eq!(&plugged, &volumes);
            prop_assert_eq!(devices.nics.len(), ports.len());
            let targets: BTreeSet<&str> =
                devices.volumes.values().map(|it| it.guest.as_str()).collect();
            prop_assert_eq!(targets.len(), volumes.len(), "no name is given twice");
            prop_assert!(!targets.contains("vda"));
        }
    }
}

fn by_iscsi(id: u128) -> Value {
    let connection = json!({
        "type": "iscsi", "portal": "192.0.2.1:3260", "iqn": format!("iqn.x:volume-{id}"), "lun": 0,
        "client": "host", "username": "user", "password": "secretsecret",
    });
    json!({"volume": Uuid::from_u128(id), "connection": connection})
}

#[test]
fn this_host_takes_a_volume_in_before_its_guest_gets_it_and_lets_go_of_it_after() {
    let mut world = world();
    let id = VolumeId(Uuid::from_u128(7));
    world.want(instance(1, 2, &json!({"volumes": [by_iscsi(7)]})), false);
    // The fake asserts that nothing is taken away from under a guest.
    assert!(is_active(&world.settle()));
    assert_eq!(targets(&world), ["vdb"]);
    let record = world.situation.store.folders[&InstanceId(GUEST)].record.clone().unwrap();
    let kept = format!("{:?}", record.attached[&id]);
    assert!(kept.contains("volume-7") && kept.contains("password: None"), "{kept}");
    assert!(!format!("{:?}", world.host.domains[&GUEST]).contains("/dev/sd"));

    // A device that says it is another one is nobody's.
    world.situation.attached.insert(id, Err("it says that it is another volume".into()));
    world.host.change(InstanceId(GUEST), &DomainChange::Destroy).unwrap();
    let plan = world.pass();
    let Outcome::Pending { reason, .. } = &plan.outcomes[&only(1)] else { panic!("{plan:?}") };
    assert!(reason.contains("another volume"), "{reason}");
    world.situation.attached.insert(id, Ok(true));
    assert!(is_active(&world.settle()));

    world.want(instance(1, 3, &json!({"volumes": []})), false);
    assert!(is_active(&world.settle()));
    assert!(world.situation.attached.is_empty());
    assert!(
        world.situation.store.folders[&InstanceId(GUEST)]
            .record
            .clone()
            .unwrap()
            .attached
            .is_empty()
    );

    // So does a deletion, also one that was cut off once the domain was gone.
    world.want(instance(1, 4, &json!({"volumes": [by_iscsi(7)]})), false);
    assert!(is_active(&world.settle()));
    world.host.domains.clear();
    world.want(instance(1, 4, &json!({"volumes": [by_iscsi(7)]})), true);
    world.settle();
    assert!(world.situation.attached.is_empty());
}
