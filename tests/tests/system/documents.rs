//! What the README tells a newcomer to type is typed here, as it stands.

use msb_tests::Home;

/// Part of this program, because the lab runs it where there is no source tree.
const README: &str = include_str!("../../../README.md");

/// The lines of README.md's block that begins with this line, without the ones only a person's shell needs.
fn block(first: &str) -> Vec<String> {
    let block = README
        .split("```console\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap_or_default())
        .find(|block| block.starts_with(first));
    block
        .unwrap_or_else(|| panic!("README.md has no block that begins with {first}"))
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_readme_shows_the_two_commands_that_matter() {
    assert_eq!(block("cargo xtask demo"), ["cargo xtask demo"]);
    assert_eq!(block("cargo xtask test"), ["cargo xtask test"]);
}

#[test]
fn the_readmes_session_works_as_it_stands() {
    let home = Home::new("readme");
    let archive = msb_tests::image("busybox.tar");
    for line in block("export PATH") {
        if line.starts_with("export PATH") {
            continue; // the test's shell has the programs on its path
        }
        let line = line.replace("$(cargo xtask images --small)/busybox.tar", archive.to_str().expect("UTF-8"));
        let finished = home.shell(&line).run().succeeds();
        let expected = match line.as_str() {
            "msb run busybox echo hello" => "hello\n",
            "echo data | msb run -i busybox -- cat" => "data\n",
            _ if line.starts_with("msb exec box") => "1\n7\n",
            "msb ls" => "web",
            _ => "",
        };
        let _ = finished.shows(expected);
    }
    assert!(home.sandboxes().is_empty(), "the session cleans up: {:?}", home.sandboxes());
    home.finish();
}
