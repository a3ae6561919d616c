//! The image commands: both archive forms, pipes, names, and what is shared.

use msb_tests::{Home, image};

#[test]
fn both_archive_forms_and_a_pipe_load_the_same_image() {
    let home = Home::with_busybox("load_forms");
    let detail = |name: &str| home.json(&["image", "inspect", name]);
    let docker = detail("busybox");
    let path = image("busybox-oci.tar");
    home.shell(&format!("msb image load < {}", path.display())).run().succeeds().shows("busybox");
    let oci = detail("busybox");
    let layers = |value: &serde_json::Value| -> Vec<String> {
        let list = value["layer_details"].as_array().cloned().unwrap_or_default();
        list.iter().map(|layer| layer["diff_id"].as_str().unwrap_or_default().to_owned()).collect()
    };
    assert_eq!(layers(&docker).len(), 3, "{docker}");
    assert_eq!(layers(&docker), layers(&oci), "the same layers");
    home.msb(["load", "-i", path.to_str().expect("UTF-8")]).run().succeeds().shows("busybox");
    home.load("app.tar");
    let listed = home.succeeds(&["image", "ls"]);
    assert!(listed.contains("busybox") && listed.contains("app"), "{listed}");
    home.msb(["run", "busybox:latest", "echo", "tagged"]).run().succeeds().prints("tagged\n");
    home.msb(["run", "docker.io/library/busybox", "echo", "full"]).run().succeeds().prints("full\n");
    let digest = detail("busybox")["digest"].as_str().expect("a digest").to_owned();
    home.msb(["run", &digest, "echo", "digest"]).run().succeeds().prints("digest\n");
    home.finish();
}

#[test]
fn a_larger_image_runs_python() {
    let Some(archive) = msb_tests::python_image() else {
        println!("skipped: the python image could not be made here (it needs root)");
        return;
    };
    let home = Home::new("python");
    home.succeeds(&["image", "load", "-i", archive.to_str().expect("UTF-8")]);
    home.msb(["run", "-m", "512M", "python", "python3", "hello.py"]).run().succeeds().shows("hello from python 3");
    home.msb(["run", "-i", "python"]).input("print(6 * 7)\n").run().succeeds().prints("42\n");
    home.finish();
}

#[test]
fn an_image_in_use_is_not_removed() {
    let home = Home::with_busybox("image_in_use");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let complaint = home.fails(&["image", "rm", "busybox"], 1, "image_in_use");
    assert!(complaint.contains("box"), "{complaint}");
    home.succeeds(&["rm", "--force", "box"]);
    home.succeeds(&["image", "rm", "busybox"]);
    home.fails(&["run", "--pull", "never", "busybox", "true"], 125, "image_not_found");
    home.finish();
}
