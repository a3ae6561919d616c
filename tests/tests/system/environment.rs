//! Environments of the size that people really have arrive intact: they travel over vsock, not on a kernel command line.

use msb_tests::Home;

#[test]
fn a_mebibyte_of_environment_and_a_hundred_kibibyte_variable_arrive_intact() {
    let home = Home::with_busybox("environment");
    let large = "x".repeat(100 << 10);
    let mut file = format!("LARGE={large}\n");
    let mut index = 0;
    while file.len() < 1 << 20 {
        file.push_str(&format!("VARIABLE_{index}={}\n", "y".repeat(1000)));
        index += 1;
    }
    let path = home.scratch().join("large.env");
    std::fs::write(&path, &file).expect("env file");
    let path = path.to_str().expect("UTF-8");

    let measure = format!("echo ${{#LARGE}} ${{#VARIABLE_0}} ${{#VARIABLE_{}}}; env | grep -c ^VARIABLE_", index - 1);
    let expected = format!("{} 1000 1000\n{index}\n", 100 << 10);
    home.msb(["run", "--env-file", path, "busybox", "--", "sh", "-c", &measure]).run().succeeds().prints(&expected);

    home.succeeds(&["create", "--name", "box", "--env-file", path, "busybox"]);
    home.msb(["exec", "box", "--", "sh", "-c", &measure]).run().succeeds().prints(&expected);
    home.msb(["exec", "-e", "MARK=quote\"and'more \\ $x \u{e4}", "box", "--", "sh", "-c", "echo \"$MARK\""])
        .run()
        .succeeds()
        .prints("quote\"and'more \\ $x \u{e4}\n");
    home.finish();
}

#[test]
fn a_bare_name_takes_the_callers_value_and_an_unset_one_is_refused() {
    let home = Home::with_busybox("environment_bare");
    home.msb(["run", "-e", "CALLER", "busybox", "--", "sh", "-c", "echo $CALLER"])
        .env("CALLER", "mine")
        .run()
        .succeeds()
        .prints("mine\n");
    let refused = home.msb(["run", "-e", "NOT_SET_ANYWHERE", "busybox", "--", "true"]).run();
    assert!(matches!(refused.code(), Some(2 | 125)), "{}", refused.account());
    let _ = refused.complains("NOT_SET_ANYWHERE");
    home.finish();
}
