package msb

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// SSHHost is how an SSH client finds a sandbox.
type SSHHost struct {
	Sandbox     string `json:"sandbox"`
	User        string `json:"user"`
	HostKey     string `json:"host_key"`
	Fingerprint string `json:"fingerprint"`
}

// SSHConfig is what ssh needs: a block for ssh_config, and the host key as a line of known_hosts.
type SSHConfig struct {
	Alias      string
	Config     string
	KnownHosts string
	Host       SSHHost
}

var (
	aliasPattern = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)
	plainPattern = regexp.MustCompile(`^[A-Za-z0-9/._=:%+@-]*$`)
)

// SSHHost tells how an SSH client finds a sandbox.
func (c *Client) SSHHost(ctx context.Context, name string) (*SSHHost, error) {
	path, err := sandboxPath(name, "/ssh/host")
	if err != nil {
		return nil, err
	}
	var host SSHHost
	if err := c.call(ctx, http.MethodGet, path, nil, &host); err != nil {
		return nil, err
	}
	return &host, nil
}

// SSHConfig gives what makes `ssh ALIAS` work; an empty alias is msb-NAME. Nothing is written anywhere.
func (s *Sandbox) SSHConfig(ctx context.Context, alias string) (*SSHConfig, error) {
	host, err := s.client.SSHHost(ctx, s.Name())
	if err != nil {
		return nil, err
	}
	if alias == "" {
		alias = "msb-" + host.Sandbox
	}
	if !aliasPattern.MatchString(alias) {
		return nil, failure("invalid_config", nil, "%q is no name of a host", alias)
	}
	return &SSHConfig{alias, sshBlock(alias, *host, ofProcess()), alias + " " + host.HostKey, *host}, nil
}

func sshBlock(alias string, host SSHHost, around surroundings) string {
	var words []string
	for _, name := range []string{"MSB_HOME", "MSB_HOST"} {
		if value := around.variable(name); value != "" {
			words = append(words, quoted(name+"="+value))
		}
	}
	if len(words) > 0 {
		words = append([]string{"/usr/bin/env"}, words...)
	}
	command := strings.Join(append(words, quoted(around.command())), " ")
	return fmt.Sprintf(`# %[1]s %[2]s
Host %[1]s
    HostName %[1]s
    User %[3]s
    ProxyCommand %[4]s ssh serve --stdio %[5]s
    KnownHostsCommand %[4]s ssh config --known-hosts --alias %[1]s %[5]s
    StrictHostKeyChecking yes
    UserKnownHostsFile none
    HostKeyAlgorithms ssh-ed25519
`, alias, host.HostKey, host.User, command, host.Sandbox)
}

// command is the msb beside the msbd that would be started, else the one in PATH.
func (s surroundings) command() string {
	if daemon, err := s.daemonProgram(); err == nil {
		if beside := filepath.Join(filepath.Dir(daemon), "msb"); isFile(beside) {
			return beside
		}
	}
	if found, err := exec.LookPath("msb"); err == nil {
		return found
	}
	return "msb"
}

// quoted is a word for the shell that runs a ProxyCommand; % begins ssh's own sequences.
func quoted(word string) string {
	word = strings.ReplaceAll(word, "%", "%%")
	if plainPattern.MatchString(word) {
		return word
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`").Replace(word) + `"`
}
