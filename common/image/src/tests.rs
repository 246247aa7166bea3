use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stackhand_model::{ImageFormat, ImageId, ImageSpec};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;

mod http;

const ID: ImageId = ImageId(Uuid::from_u128(5));

fn cache() -> (TempDir, ImageCache) {
    let root = tempfile::tempdir().unwrap();
    let tool = ImageTool::new(Path::new("/usr/bin/qemu-img"), 60);
    let cache = ImageCache::new(&root.path().join("images"), 1 << 20, tool);
    (root, cache)
}

fn spec(source: &Path, checksum: Option<&str>) -> ImageSpec {
    ImageSpec {
        source: source.display().to_string(),
        checksum: checksum.map(str::to_owned),
        format: ImageFormat::Raw,
        min_disk_gib: 0,
        kernel: None,
        ramdisk: None,
        command_line: None,
    }
}

fn file(root: &TempDir, contents: &[u8]) -> PathBuf {
    let path = root.path().join("source");
    fs::write(&path, contents).unwrap();
    path
}

/// SHA-256 of `abc`, from the standard's own example.
const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
/// SHA-512 of the same.
const ABC_512: &str = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";

#[tokio::test]
async fn a_fetched_image_has_its_contents_by_hash_and_survives_its_source() {
    let (root, cache) = cache();
    let source = file(&root, b"abc");
    for checksum in [None, Some(format!("sha256:{ABC}")), Some(format!("sha512:{ABC_512}"))] {
        let spec = spec(&source, checksum.as_deref());
        let image = cache.fetch(ID, &spec, &Arc::default()).await.unwrap();
        assert_eq!((image.contents.as_str(), image.bytes), (ABC, 3));
        assert!(image.is_of(&spec));
    }
    fs::remove_file(&source).unwrap();
    assert_eq!(fs::read(cache.path(ABC)).unwrap(), b"abc");
    let seen = cache.look().unwrap();
    assert_eq!(seen.images[&ID].virtual_bytes, 3);
    assert_eq!(seen.contents.len(), 1);

    cache.forget(ID).unwrap();
    cache.remove_contents(ABC).unwrap();
    assert_eq!(cache.look().unwrap(), CacheSeen::default());
}

#[tokio::test]
async fn a_wrong_checksum_leaves_nothing() {
    let (root, cache) = cache();
    let spec = spec(&file(&root, b"abd"), Some(&format!("sha256:{ABC}")));
    let error = cache.fetch(ID, &spec, &Arc::default()).await.unwrap_err();
    assert!(matches!(error, FetchError::Checksum { .. }), "{error}");
    assert_eq!(cache.look().unwrap(), CacheSeen::default());
}

#[tokio::test]
async fn what_is_no_file_or_too_large_is_refused_without_waiting() {
    let (root, cache) = cache();
    let pipe = root.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for source in [&pipe, Path::new("/dev/zero"), root.path()] {
        let error = cache.fetch(ID, &spec(source, None), &Arc::default()).await.unwrap_err();
        assert!(matches!(error, FetchError::NotAFile { .. }), "{error}");
    }
    let large = file(&root, &vec![1; (1 << 20) + 1]);
    let error = cache.fetch(ID, &spec(&large, None), &Arc::default()).await.unwrap_err();
    assert!(matches!(error, FetchError::TooLarge { .. }), "{error}");
    let missing = cache.fetch(ID, &spec(Path::new("/none"), None), &Arc::default()).await;
    assert_eq!(missing.unwrap_err().to_string(), "cannot open /none");
    assert_eq!(cache.look().unwrap(), CacheSeen::default());
}

#[tokio::test]
async fn an_image_whose_contents_are_gone_is_not_there() {
    let (root, cache) = cache();
    let spec = spec(&file(&root, b"abc"), None);
    cache.fetch(ID, &spec, &Arc::default()).await.unwrap();
    fs::remove_file(cache.path(ABC)).unwrap();
    assert_eq!(cache.look().unwrap().images.len(), 0);
}

/// A disk of 1 MiB with something in it, in a format of QEMU's.
fn disk(root: &TempDir, driver: &str, options: &[&str]) -> PathBuf {
    let (raw, path) = (root.path().join("raw"), root.path().join(format!("disk.{driver}")));
    let mut bytes = vec![0; 1 << 20];
    bytes[4096..8192].fill(7);
    fs::write(&raw, bytes).unwrap();
    let (raw, target) = (raw.to_str().unwrap(), path.to_str().unwrap());
    qemu_img(&[&["convert", "-f", "raw", "-O", driver], options, &[raw, target]].concat());
    path
}

#[expect(clippy::disallowed_methods, reason = "set-up of a test, ended by its own time limit")]
fn qemu_img(args: &[&str]) {
    let status = std::process::Command::new("/usr/bin/qemu-img").args(args).status();
    assert!(status.expect("qemu-img is needed: apt-get install qemu-utils").success(), "{args:?}");
}

#[tokio::test]
async fn a_decompression_bomb_is_refused_by_the_size_it_unpacks_to() {
    let (root, cache) = cache();
    let (raw, bomb) = (file(&root, &vec![b'A'; 64 << 20]), root.path().join("bomb"));
    for format in [ImageFormat::Qcow2, ImageFormat::Vmdk] {
        let driver = if format == ImageFormat::Qcow2 { "qcow2" } else { "vmdk" };
        let options: &[&str] =
            if driver == "vmdk" { &["-o", "subformat=streamOptimized"] } else { &["-c"] };
        let paths = [raw.to_str().unwrap(), bomb.to_str().unwrap()];
        qemu_img(&[&["convert", "-f", "raw", "-O", driver], options, &paths].concat());
        assert!(
            fs::metadata(&bomb).unwrap().len() < 1 << 20,
            "it is small as long as it is packed"
        );
        let spec = ImageSpec { format, ..spec(&bomb, None) };
        let error = cache.fetch(ID, &spec, &Arc::default()).await.unwrap_err();
        assert!(error.to_string().contains("see max_image_gib"), "{error}");
        assert_eq!(cache.look().unwrap(), CacheSeen::default());
    }
}

#[tokio::test]
async fn other_hypervisors_disks_become_plain_bytes() {
    let root = tempfile::tempdir().unwrap();
    for (format, driver, options) in [
        (ImageFormat::Vmdk, "vmdk", &[][..]),
        (ImageFormat::Vmdk, "vmdk", &["-o", "subformat=streamOptimized"]),
        (ImageFormat::Vhd, "vpc", &["-o", "force_size=on"]),
        (ImageFormat::Vhd, "vpc", &["-o", "subformat=fixed,force_size=on"]),
        (ImageFormat::Vhdx, "vhdx", &["-o", "block_size=1M,log_size=1M"]),
        (ImageFormat::Vdi, "vdi", &[]),
    ] {
        let spec = ImageSpec { format, ..spec(&disk(&root, driver, options), None) };
        let tool = ImageTool::new(Path::new("/usr/bin/qemu-img"), 60);
        // A VHDX of one megabyte is much larger itself.
        let cache = ImageCache::new(&root.path().join("images"), 16 << 20, tool);
        let image = cache.fetch(ID, &spec, &Arc::default()).await.unwrap();
        assert_eq!(image.virtual_bytes, 1 << 20, "{format:?} {options:?}");
        let bytes = fs::read(cache.path(&image.contents)).unwrap();
        assert!(bytes == fs::read(root.path().join("raw")).unwrap(), "{format:?} {options:?}");
        assert!(cache.look().unwrap().partials.is_empty());
    }
    // What is larger inside than the limit says is not let in.
    let spec = ImageSpec { format: ImageFormat::Vhdx, ..spec(&root.path().join("huge"), None) };
    qemu_img(&["create", "-q", "-f", "vhdx", &spec.source, "2T"]);
    let tool = ImageTool::new(Path::new("/usr/bin/qemu-img"), 60);
    let cache = ImageCache::new(&root.path().join("images"), 16 << 20, tool);
    let error = cache.fetch(ID, &spec, &Arc::default()).await.unwrap_err();
    assert!(stackhand_runtime::chain(&error).contains("the limit is"), "{error:?}");
    assert!(cache.look().unwrap().partials.is_empty());
}

#[tokio::test]
async fn images_of_one_source_share_a_fetch_and_one_of_a_known_checksum_needs_none() {
    let (root, cache) = cache();
    let spec = spec(&file(&root, b"abc"), Some(&format!("sha256:{ABC}")));
    let fetches = Fetches::new(cache.clone(), 1, stackhand_runtime::wake::Wake::new());
    let ids: Vec<ImageId> = (5..9).map(|id| ImageId(Uuid::from_u128(id))).collect();
    for &id in &ids {
        fetches.start(id, spec.clone());
    }
    while !fetches.states().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let seen = cache.look().unwrap();
    assert_eq!(seen.images.keys().copied().collect::<Vec<_>>(), ids);
    // Without its source.
    let elsewhere = ImageSpec { source: "/none".into(), ..spec };
    let image = cache.fetch(ID, &elsewhere, &Arc::default()).await.unwrap();
    assert!(image.is_of(&elsewhere) && image.contents == ABC);
}

#[tokio::test]
async fn a_conversion_tells_how_far_it_is_and_ends_when_it_is_called_off() {
    let root = tempfile::tempdir().unwrap();
    let [raw, image, target] = ["raw", "image", "target"].map(|name| root.path().join(name));
    fs::write(&raw, vec![7; 4 << 20]).unwrap();
    let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", paths[0], paths[1]]);
    let tool = ImageTool::new(Path::new("/usr/bin/qemu-img"), 60);
    let progress = Progress::default();
    let info = tool.to_raw(&image, "qcow2", &target, false, 8 << 20, &progress).await.unwrap();
    assert_eq!((info.virtual_bytes, progress.percent()), (4 << 20, 100));
    assert_eq!(fs::read(&target).unwrap(), fs::read(&raw).unwrap());

    let progress = Progress { cancelled: true.into(), ..Progress::default() };
    let ended = tool.to_raw(&image, "qcow2", &target, true, 8 << 20, &progress).await;
    assert!(matches!(ended, Err(ToolError::Cancelled { .. })), "{ended:?}");
}
