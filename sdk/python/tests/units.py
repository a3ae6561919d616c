"""What the Python package does without a service: pure functions, and refusals before any connection. Run by `cargo xtask test --only sdk`."""

from __future__ import annotations

import os
import unittest

from msb import Image, InvalidConfigError, MsbError, Network, PathExistsError, PathNotFoundError, Sandbox, SshHost, Volume
from msb.copy import place
from msb.spec import create_request, port_of
from msb.ssh import quoted, ssh_config


class Units(unittest.TestCase):
    def test_destinations_are_those_of_docker(self) -> None:
        for source, is_directory, destination, found, wanted in [
            ("a/f", False, "new", "nothing", (".", "new")),
            ("a/f", False, "/x/new/", "nothing", PathNotFoundError),
            ("a/f", False, "/x/old", "file", ("/x/", "old")),
            ("a/f", False, "/x", "directory", ("/x", "f")),
            ("a/d/", True, "/x/new/", "nothing", ("/x/", "new")),
            ("a/d", True, "/x/old", "file", PathExistsError),
            ("a/d/.", True, "/x", "directory", ("/x", None)),
            ("/", True, "/x", "directory", ("/x", None)),
            ("a/f", False, "..", "nothing", PathNotFoundError),
        ]:
            with self.subTest(source=source, destination=destination):
                try:
                    got: object = place(source, is_directory, destination, found)
                except MsbError as error:
                    got = type(error)
                self.assertEqual(got, wanted)

    def test_ports_are_read(self) -> None:
        self.assertEqual(port_of("8080:80"), {"bind": "127.0.0.1", "host_port": 8080, "guest_port": 80, "transport": "tcp"})
        self.assertEqual(port_of("[::1]:0:53/udp"), {"bind": "::1", "host_port": 0, "guest_port": 53, "transport": "udp"})
        for wrong in ("80", "80:0", "80:65536", "65536:80", "x:80", "80:80/sctp", "80:80\n"):
            with self.subTest(wrong), self.assertRaises(InvalidConfigError):
                port_of(wrong)

    def test_a_request_has_what_was_said(self) -> None:
        network = Network("none", rules=["deny@example.com"], nameservers=["9.9.9.9:53"])
        mounts = [Volume.tmpfs("/t", size_mib=8), Volume.named("data", "/d", read_only=True)]
        spec = create_request("n", "busybox", network=network, ports=["0:80"], mounts=mounts, rlimits={"nofile": (1, 2)})["spec"]
        self.assertEqual(spec["network"]["dns"], {"nameservers": ["9.9.9.9:53"]})
        self.assertEqual(spec["network"]["ports"][0]["guest_port"], 80)
        self.assertEqual([mount["options"]["read_only"] for mount in spec["mounts"]], [False, True])
        self.assertEqual(spec["rlimits"], [{"resource": "nofile", "soft": 1, "hard": 2}])

    def test_a_root_is_an_image_a_directory_or_a_disk(self) -> None:
        for root, kind in ((Image.oci("/srv/root"), "image"), (Image.bind("/srv/root"), "directory"), (Image.disk("/srv/root"), "disk")):
            with self.subTest(root):
                spec = create_request("n", root)["spec"]
                self.assertEqual((spec["image"], spec["root"]), ("/srv/root", kind))
        self.assertNotIn("root", create_request("n", "busybox")["spec"])
        self.assertTrue(os.path.isabs(create_request("n", Image.bind("tree"))["spec"]["image"]))

    def test_the_block_for_ssh_quotes_what_it_must(self) -> None:
        self.assertEqual(quoted("/usr/bin/msb"), "/usr/bin/msb")
        self.assertEqual(quoted("MSB_HOME=/100%/$x"), '"MSB_HOME=/100%%/\\$x"')
        host = SshHost("box", "app", "ssh-ed25519 AAAA", "SHA256:x")
        self.assertIn("\nHost here\n", ssh_config(host, "here").config)
        with self.assertRaises(InvalidConfigError):
            ssh_config(host, "a b")


if __name__ == "__main__":
    unittest.main()
