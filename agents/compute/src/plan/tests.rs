mod live;

use proptest::prelude::*;
use serde_json::{Value, json};
use stackhand_model::{Document, ImageFormat, PowerState};
use stackhand_runtime::agent::{Desired, Held};

use super::*;
use crate::hypervisor::fake::Host;
use crate::hypervisor::{OffReason, Power, Stall};
use crate::store::FolderSeen;
use stackhand_image::CachedImage;

/// A host that exists only in memory: the planner's situation, changed by the planner's steps.
struct World {
    wanted: Desired,
    host: Host,
    situation: Situation,
}

impl World {
    fn new() -> Self {
        let situation = Situation {
            fashion: Ok(Fashion {
                engine: Engine::Qemu,
                machine: "q35".into(),
                disk_cache: "none".into(),
                images: "/images".into(),
                instances: "/instances".into(),
                hotplug_slots: 4,
            }),
            domains: Ok(BTreeMap::new()),
            cache: CacheSeen::default(),
            fetches: BTreeMap::new(),
            store: StoreSeen::default(),
            links: BTreeSet::new(),
            volumes: BTreeSet::new(),
            attached: BTreeMap::new(),
            stopping: BTreeMap::new(),
            crashed: BTreeSet::new(),
            detaching: BTreeMap::new(),
            keep_unused: (0, 0),
            capacity: None,
            busy: BTreeSet::new(),
        };
        Self { wanted: Desired::default(), host: Host::default(), situation }
    }

    fn want(&mut self, document: Document, deleting: bool) {
        let held = Held { document: document.into(), deleting };
        self.wanted.objects.insert(held.document.object(), held);
    }

    fn due(&self) -> BTreeSet<ObjectRef> {
        self.wanted.objects.keys().copied().collect()
    }

    /// One pass: plan, perform, forget what is gone. Returns the plan.
    fn pass(&mut self) -> Plan {
        self.situation.domains = Ok(self.host.domains.clone());
        let wanted = Wanted::new(&self.wanted);
        let plan = Plan::new(&wanted, &self.situation, &self.due());
        for (object, steps) in &plan.steps {
            for step in steps {
                self.perform(&wanted, Some(*object), step);
            }
        }
        for step in &plan.cleanup {
            self.perform(&wanted, None, step);
        }
        for (object, outcome) in &plan.outcomes {
            if *outcome == Outcome::Gone {
                self.wanted.objects.remove(object);
            }
        }
        plan
    }

    fn perform(&mut self, wanted: &Wanted, object: Option<ObjectRef>, step: &Step) {
        let id = InstanceId(object.map_or(Uuid::nil(), |object| object.id));
        match step.clone() {
            // A fetch is done at once here.
            Step::Fetch(image) => {
                let spec = &wanted.images[&image].spec;
                let contents = format!("contents-of-{}", spec.source);
                self.situation.cache.contents.insert(contents.clone());
                let cached = CachedImage {
                    source: spec.source.clone(),
                    checksum: spec.checksum.clone(),
                    format: spec.format,
                    disk: FileFormat::Qcow2,
                    contents,
                    bytes: 1 << 20,
                    virtual_bytes: 3 << 30,
                };
                self.situation.cache.images.insert(image, cached);
            }
            Step::CallOff(image) => drop(self.situation.fetches.remove(&image)),
            Step::Forget(image) => drop(self.situation.cache.images.remove(&image)),
            Step::RemovePartial(image) => drop(self.situation.cache.partials.remove(&image)),
            Step::RemoveContents(contents) => {
                self.situation.cache.contents.remove(&contents);
            }
            Step::Prepare(record) => {
                let new = FolderSeen { record: None, parts: BTreeSet::new() };
                self.situation.store.folders.entry(id).or_insert(new).record = Some(*record);
            }
            Step::MakeDisk { contents, .. } => {
                assert!(self.situation.cache.contents.contains(&contents));
                let folder = self.situation.store.folders.get_mut(&id).unwrap();
                assert!(folder.record.is_some(), "a file before its record");
                folder.parts.insert(Part::Root);
            }
            Step::MakeBlank { part, .. } => self.part(id, part),
            Step::WriteConfigDrive => self.part(id, Part::ConfigDrive),
            Step::RemovePart(part) => {
                self.situation.store.folders.get_mut(&id).unwrap().parts.remove(&part);
            }
            Step::EndSnapshot | Step::BeginLog => {}
            Step::Initiator(Question::Attach { volume, .. }) => {
                self.situation.attached.insert(volume, Ok(true));
            }
            Step::Initiator(Question::Detach { volume, .. }) => {
                let mut domains = self.host.domains.values();
                let has_it = domains.any(|it| it.devices.volumes.contains_key(&volume));
                assert!(!has_it, "taken away from under a guest");
                self.situation.attached.remove(&volume);
            }
            Step::Initiator(_) => {}
            Step::Domain(change) => {
                if matches!(change, DomainChange::Define { .. }) {
                    assert!(
                        self.situation.store.folders.contains_key(&id),
                        "a domain before its folder"
                    );
                }
                if change == DomainChange::Shutdown {
                    self.situation.stopping.insert(id, false);
                }
                if let DomainChange::Start { .. } = change {
                    self.situation.stopping.remove(&id);
                }
                self.host.change(id, &change).unwrap();
            }
            Step::RemoveFiles(id) => {
                self.situation.store.folders.remove(&id);
                self.situation.store.deleted.remove(&id);
            }
        }
    }

    fn part(&mut self, id: InstanceId, part: Part) {
        let folder = self.situation.store.folders.get_mut(&id).unwrap();
        assert!(folder.record.is_some(), "a file before its record");
        folder.parts.insert(part);
    }

    fn settle(&mut self) -> Plan {
        for _ in 0..10 {
            let plan = self.pass();
            if plan.steps.is_empty() && plan.cleanup.is_empty() {
                return plan;
            }
        }
        panic!("does not come to rest: {:?}", self.situation);
    }

    fn power(&self, id: u128) -> Power {
        self.host.domains[&Uuid::from_u128(id)].power
    }
}

fn document(kind: &str, id: u128, generation: u64, spec: &Value) -> Document {
    let (name, id) = (format!("{}{id}", kind.to_lowercase()), Uuid::from_u128(id));
    Document::from_value(&json!({
        "kind": kind, "id": id, "name": name, "generation": generation, "spec": spec,
    }))
    .unwrap()
}

fn image(id: u128, format: ImageFormat) -> Document {
    document("Image", id, 1, &json!({"source": format!("/source/{id}"), "format": format}))
}

/// An instance whose first eight digits differ from those of others.
fn instance_id(id: u128) -> u128 {
    id << 100
}

fn instance(id: u128, generation: u64, fields: &Value) -> Document {
    let mut spec = json!({
        "host": "here", "vcpus": 1, "memory_mib": 64, "image": Uuid::from_u128(9),
    });
    for (key, value) in fields.as_object().unwrap() {
        spec[key] = value.clone();
    }
    document("Instance", instance_id(id), generation, &spec)
}

fn reason(plan: &Plan, object: ObjectRef) -> &str {
    match &plan.outcomes[&object] {
        Outcome::Pending { reason, .. } | Outcome::Failed { reason, .. } => reason,
        other => panic!("{object} came out as {other:?}"),
    }
}

fn running() -> World {
    let mut world = World::new();
    world.want(image(9, ImageFormat::Qcow2), false);
    world.want(instance(1, 1, &json!({})), false);
    world.settle();
    assert_eq!(world.power(instance_id(1)), Power::Running);
    world
}

fn only(id: u128) -> ObjectRef {
    InstanceId(Uuid::from_u128(instance_id(id))).object()
}

#[test]
fn an_instance_waits_for_its_image_and_then_starts_and_rests() {
    let mut world = World::new();
    world.want(instance(1, 1, &json!({})), false);
    let plan = world.settle();
    assert!(reason(&plan, only(1)).contains("it is not known here"));
    assert!(world.host.domains.is_empty() && world.situation.store.folders.is_empty());
    world.want(image(9, ImageFormat::Qcow2), false);
    let plan = world.settle();
    assert!(matches!(plan.outcomes[&only(1)], Outcome::Active { .. }));
    assert_eq!(world.power(instance_id(1)), Power::Running);
}

#[test]
fn a_root_disk_smaller_than_its_image_is_refused_before_anything_is_made() {
    let mut world = World::new();
    world.want(image(9, ImageFormat::Raw), false);
    world.want(instance(1, 1, &json!({"root_disk_gib": 2})), false);
    let plan = world.settle();
    assert!(reason(&plan, only(1)).contains("needs a root disk of 3 GiB"));
    assert!(world.host.domains.is_empty() && world.situation.store.folders.is_empty());
}

#[test]
fn a_guest_that_shut_itself_down_stays_off_until_told_and_then_may_do_so_again() {
    let mut world = running();
    for _ in 0..2 {
        world.host.domains.get_mut(&Uuid::from_u128(instance_id(1))).unwrap().power =
            Power::Off(OffReason::Shutdown);
        let plan = world.settle();
        let Outcome::Active { observed } = &plan.outcomes[&only(1)] else { panic!("{plan:?}") };
        let observed = observed.facts(&only(1));
        assert_eq!(observed["power_state"], "shutoff");
        assert!(observed["power_reason"].as_str().unwrap().starts_with("the guest shut itself"));
        // The action start, as it is written into the record.
        let id = InstanceId(Uuid::from_u128(instance_id(1)));
        let record = world.situation.store.folders.get_mut(&id).unwrap().record.as_mut().unwrap();
        record.power = Some(crate::store::PowerOverride {
            generation: 1,
            state: PowerState::Running,
            by_guest: false,
        });
        record.seen_running = None;
        world.settle();
        assert_eq!(world.power(instance_id(1)), Power::Running);
    }
}

#[test]
fn after_a_host_reboot_what_ran_is_started_and_what_was_off_is_not() {
    let mut world = running();
    world.want(instance(2, 1, &json!({"power_state": "shutoff"})), false);
    world.settle();
    for domain in world.host.domains.values_mut() {
        domain.power = Power::Off(OffReason::Unknown);
        domain.running_mark = None;
    }
    world.settle();
    assert_eq!(world.power(instance_id(1)), Power::Running);
    assert_eq!(world.power(instance_id(2)), Power::Off(OffReason::Unknown));
}

#[test]
fn a_deaf_guest_is_powered_off_when_its_time_is_up() {
    let mut world = running();
    world.host.deaf.insert(Uuid::from_u128(instance_id(1)));
    world.want(instance(1, 2, &json!({"power_state": "shutoff"})), false);
    world.pass();
    let plan = world.pass();
    assert_eq!(reason(&plan, only(1)), "waits for the guest to shut down");
    assert_eq!(world.power(instance_id(1)), Power::Running);
    world.situation.stopping.values_mut().for_each(|up| *up = true);
    world.settle();
    assert_eq!(world.power(instance_id(1)), Power::Off(OffReason::Destroyed));
}

#[test]
fn a_crashed_guest_is_told_before_it_is_started_again() {
    let mut world = running();
    let id = Uuid::from_u128(instance_id(1));
    world.host.domains.get_mut(&id).unwrap().power = Power::Off(OffReason::Crashed);
    let plan = world.pass();
    assert!(reason(&plan, only(1)).starts_with("the guest crashed"));
    world.situation.crashed.insert(InstanceId(id));
    world.pass();
    assert_eq!(world.power(instance_id(1)), Power::Running);
}

#[test]
fn a_guest_that_stands_still_goes_on_when_there_is_room_and_is_left_to_who_set_a_watchdog() {
    let mut world = running();
    let id = Uuid::from_u128(instance_id(1));
    world.host.domains.get_mut(&id).unwrap().power = Power::Stalled(Stall::Disk);
    let plan = world.pass();
    assert!(reason(&plan, only(1)).contains("make room on the host"));
    world.situation.crashed.insert(InstanceId(id));
    world.pass();
    assert_eq!(world.power(instance_id(1)), Power::Running);

    let watchdog = Power::Stalled(Stall::Watchdog);
    world.host.domains.get_mut(&id).unwrap().power = watchdog;
    for _ in 0..2 {
        let plan = world.pass();
        assert!(reason(&plan, only(1)).contains("reboot it hard"));
        assert_eq!(world.power(instance_id(1)), watchdog);
    }
    world.want(instance(1, 2, &json!({"power_state": "shutoff"})), false);
    world.settle();
    assert!(world.power(instance_id(1)).is_off());
}

#[test]
fn a_running_guest_is_not_disturbed_by_a_change_and_says_that_it_waits() {
    let mut world = running();
    world.want(instance(1, 2, &json!({"vcpus": 2})), false);
    let plan = world.settle();
    assert!(reason(&plan, only(1)).contains("reboot it hard"));
    assert_eq!(world.power(instance_id(1)), Power::Running);
    // A change of the document that changes nothing of the domain.
    let mut world = running();
    world.want(instance(1, 2, &json!({"guest": {"metadata": {"role": "web"}}})), false);
    let plan = world.pass();
    let defines = |step: &Step| matches!(step, Step::Domain(_));
    assert!(!plan.steps.values().flatten().any(defines), "{plan:?}");
}

#[test]
fn contents_are_kept_as_long_as_an_instance_lies_over_them() {
    let mut world = running();
    world.want(image(9, ImageFormat::Qcow2), true);
    world.settle();
    assert_eq!(world.situation.cache.images.len(), 0);
    assert_eq!(world.situation.cache.contents.len(), 1);
    world.want(instance(1, 1, &json!({})), true);
    world.settle();
    assert_eq!(world.situation.cache.contents.len(), 0);
    assert!(world.host.domains.is_empty() && world.situation.store.folders.is_empty());
}

#[test]
fn contents_that_nobody_uses_are_kept_for_a_while_and_the_oldest_go_first() {
    let mut world = World::new();
    world.situation.keep_unused = (100, 25);
    for (name, bytes, seconds) in [("old", 1, 100), ("a", 10, 10), ("b", 10, 20), ("c", 10, 30)] {
        world.situation.cache.contents.insert(name.into());
        world.situation.cache.ages.insert(name.into(), (bytes, seconds));
    }
    let plan = world.pass();
    let doomed = ["c", "old"].map(|name| Step::RemoveContents(name.into()));
    assert_eq!(plan.cleanup, doomed);
    world.settle();
    assert_eq!(world.situation.cache.contents.len(), 2);
}

#[test]
fn a_foreign_domain_of_our_uuid_or_name_survives() {
    for same_uuid in [true, false] {
        let mut world = World::new();
        let uuid = Uuid::from_u128(if same_uuid { instance_id(1) } else { 77 });
        let foreign = DomainSeen {
            uuid,
            name: crate::domain::domain_name(InstanceId(Uuid::from_u128(instance_id(1)))),
            power: Power::Running,
            mark: None,
            running_mark: None,
            vnc_port: None,
            devices: crate::domain::Devices::default(),
            saved: false,
        };
        world.host.domains.insert(uuid, foreign.clone());
        world.want(image(9, ImageFormat::Qcow2), false);
        world.want(instance(1, 1, &json!({})), false);
        let plan = world.settle();
        assert!(reason(&plan, only(1)).contains("was not made by this agent"));
        world.want(instance(1, 1, &json!({})), true);
        world.settle();
        assert!(world.wanted.objects.len() == 1, "the instance is gone, the image stays");
        assert_eq!(world.host.domains[&uuid], foreign);
    }
}

#[test]
fn domains_of_ours_without_a_document_are_orphans_and_are_left_running() {
    let mut world = running();
    world.wanted.objects.clear();
    let plan = world.settle();
    assert!(plan.steps.is_empty());
    assert_eq!(world.power(instance_id(1)), Power::Running);
    world.situation.domains = Ok(world.host.domains.clone());
    assert_eq!(orphans(&Wanted::default(), &world.situation).len(), 1);
}

#[test]
fn devices_stay_where_they_were_asked_for_and_others_fill_the_gaps() {
    let volume = |id: u128, device: Option<&str>| {
        let path = format!("/v/{id}");
        let connection = json!({"type": "file", "path": path, "format": "raw"});
        let mut volume = json!({"volume": Uuid::from_u128(id), "connection": connection});
        if let Some(device) = device {
            volume["device"] = device.into();
        }
        volume
    };
    let mut world = World::new();
    let volumes = json!([volume(1, None), volume(2, Some("vdb")), volume(3, Some("vda"))]);
    world.want(image(9, ImageFormat::Qcow2), false);
    world.want(instance(1, 1, &json!({"volumes": volumes})), false);
    world.situation.volumes = ["/v/1", "/v/2", "/v/3"].map(PathBuf::from).into();
    world.pass();
    let plan = world.pass();
    let xml = plan.steps[&only(1)]
        .iter()
        .find_map(|step| match step {
            Step::Domain(DomainChange::Define { xml }) => Some(xml.clone()),
            _ => None,
        })
        .unwrap();
    let order: Vec<&str> = xml.lines().filter(|line| line.contains("<target dev=")).collect();
    let order: Vec<&str> = order.iter().filter_map(|line| line.split('"').nth(1)).collect();
    assert_eq!(order, ["vda", "vdb", "vdc", "vdd"]);
    let root = xml.find("/disk\"").unwrap();
    assert!(xml[root..].find("vdc") < xml[root..].find("/v/1"), "the root disk took the first gap");
}

/// Instances 1–3 and images, in any state that documents can ask for.
fn any_wish() -> impl Strategy<Value = (Document, bool)> {
    let power = prop_oneof![Just("running"), Just("shutoff"), Just("paused")];
    let deleting = prop::bool::weighted(0.25);
    prop_oneof![
        3 => (1u128..4, 1u64..4, power, 1u32..3, deleting).prop_map(
            |(id, generation, power, vcpus, deleting)| {
                let fields = json!({"power_state": power, "vcpus": vcpus});
                (instance(id, generation, &fields), deleting)
            }
        ),
        1 => deleting.prop_map(|deleting| (image(9, ImageFormat::Qcow2), deleting)),
    ]
}

proptest! {
    #[test]
    fn any_wish_comes_to_rest_with_every_active_instance_as_it_should_be(
        wishes in proptest::collection::vec(any_wish(), 0..12), off in 0usize..12,
    ) {
        let mut world = World::new();
        for (index, (document, deleting)) in wishes.into_iter().enumerate() {
            world.want(document, deleting);
            world.settle();
            if index == off {
                // The host loses power.
                for domain in world.host.domains.values_mut() {
                    domain.power = Power::Off(OffReason::Unknown);
                    domain.running_mark = None;
                }
            }
        }
        let plan = world.settle();
        let wanted = Wanted::new(&world.wanted);
        for (id, wish) in &wanted.instances {
            if !matches!(plan.outcomes[&id.object()], Outcome::Active { .. }) {
                continue;
            }
            let power = world.host.domains[&id.0].power;
            let good = match wish.spec.power_state {
                PowerState::Running => power == Power::Running,
                PowerState::Paused => power == Power::Paused,
                PowerState::Shutoff | PowerState::Suspended => power.is_off(),
            };
            prop_assert!(good, "{} is {:?}", id, power);
        }
        // Nothing is left of what is gone.
        for uuid in world.host.domains.keys() {
            prop_assert!(wanted.instances.contains_key(&InstanceId(*uuid)));
        }
        for id in world.situation.store.folders.keys() {
            prop_assert!(wanted.instances.contains_key(id));
        }
    }

    #[test]
    fn a_pass_that_breaks_off_at_any_step_is_finished_by_the_next(cut in 0usize..6) {
        let mut world = World::new();
        world.want(image(9, ImageFormat::Qcow2), false);
        world.pass();
        world.want(instance(1, 1, &json!({})), false);
        for deleting in [false, true] {
            world.want(instance(1, 1, &json!({})), deleting);
            world.situation.domains = Ok(world.host.domains.clone());
            let wanted = Wanted::new(&world.wanted);
            let plan = Plan::new(&wanted, &world.situation, &world.due());
            for step in plan.steps.get(&only(1)).into_iter().flatten().take(cut) {
                world.perform(&wanted, Some(only(1)), step);
            }
            world.settle();
            prop_assert_eq!(world.host.domains.is_empty(), deleting);
            prop_assert_eq!(world.situation.store.folders.is_empty(), deleting);
        }
    }
}
