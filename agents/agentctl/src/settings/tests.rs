use super::*;

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(user: &str, system: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.toml"), user).unwrap();
        std::fs::write(folder.path().join("system.toml"), system).unwrap();
        Self { folder }
    }

    fn load(&self, flags: &Globals, environment: &[(&str, &str)]) -> Result<Settings, Usage> {
        let variable = |name: &str| {
            environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
        };
        let path = self.folder.path();
        Settings::from_layers(flags, variable, Some(path), &path.join("system.toml"))
    }
}

#[test]
fn flags_win_over_environment_over_the_users_file_over_the_hosts() {
    let place = Place::new(
        "cloud = 'user'\ntimeout_seconds = 5",
        "cloud = 'system'\ntimeout_seconds = 7\nrun_dir = '/system'\noutput = 'wide'",
    );
    let flags = Globals { output: Some(Output::Json), ..Globals::default() };
    let settings = place.load(&flags, &[("AGENTCTL_CLOUD", "env"), ("AGENTCTL_KEY", "")]).unwrap();
    assert_eq!(settings.output.value, Output::Json);
    assert_eq!(settings.output.source, Source::Flag("--output"));
    assert_eq!(settings.cloud.value, "env");
    assert_eq!(settings.timeout.value, Duration::from_secs(5));
    assert_eq!(settings.run_dir.value, Path::new("/system"));
    assert_eq!(settings.key.source, Source::Default);
    let user = place.folder.path().join("config.toml");
    assert_eq!(settings.timeout.source, Source::File(user));
}

#[test]
fn without_a_broker_the_sockets_of_this_host_are_used_and_local_overrides_a_broker() {
    let bare = Place::new("", "");
    assert!(bare.load(&Globals::default(), &[]).unwrap().url.value.is_none());
    let with_broker = Place::new("url = 'rabbit://u:p@b1/'", "");
    let settings = with_broker.load(&Globals::default(), &[]).unwrap();
    assert_eq!(settings.url.value.unwrap().expose(), "rabbit://u:p@b1/");
    let flags = Globals { local: true, ..Globals::default() };
    let settings = with_broker.load(&flags, &[("AGENTCTL_URL", "rabbit://b2/")]).unwrap();
    assert!(settings.url.value.is_none());
    assert_eq!(settings.url.source, Source::Flag("--local"));
}

#[test]
fn the_password_of_a_broker_is_not_shown() {
    let place = Place::new("url = 'rabbit://u:hunter2@b1/'", "");
    let rows = place.load(&Globals::default(), &[]).unwrap().rows();
    let url = rows.iter().find(|row| row.setting == "url").unwrap();
    assert!(url.value.contains("b1") && !url.value.contains("hunter2"), "{}", url.value);
}

#[test]
fn a_wrong_value_is_told_with_its_source() {
    let flags = Globals::default();
    let problem = |user: &str, environment: &[(&str, &str)]| {
        Place::new(user, "").load(&flags, environment).unwrap_err().to_string()
    };
    assert_eq!(
        problem("", &[("AGENTCTL_TIMEOUT", "soon")]),
        "timeout \"soon\" is not a number of seconds from 1 to 3600 (from environment AGENTCTL_TIMEOUT)"
    );
    assert!(problem("\ncluod = 'x'", &[]).contains("config.toml:2: unknown field `cluod`"));
    assert!(problem("url = 'http://x/'", &[]).starts_with("url: "));
    assert!(problem("", &[("AGENTCTL_OUTPUT", "xml")]).contains("none of table, wide, json, yaml"));
}
