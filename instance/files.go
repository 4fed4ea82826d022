package instance

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// resolvedConf is systemd-resolved's list of the real servers. /etc/resolv.conf then names only a server on the host's loopback,
// which an Instance cannot reach.
const resolvedConf = "/run/systemd/resolve/resolv.conf"

// maxResolvConf bounds what is read of a resolv.conf.
const maxResolvConf = 64 << 10

// Names of the files that are mounted over those of the same name in /etc.
const (
	fileHosts      = "hosts"
	fileHostname   = "hostname"
	fileResolvConf = "resolv.conf"
)

func (e *Engine) filesRoot() string { return filepath.Join(e.cfg.Root, "instances") }

// filesOf is the directory of the files of one Instance.
func (e *Engine) filesOf(id string) string { return filepath.Join(e.filesRoot(), id) }

// outputOf is where the output of an Instance's process goes until a Function's log is made of it.
func (e *Engine) outputOf(id string) string { return filepath.Join(e.filesOf(id), "output"+logSuffix) }

// outputTo has containerd's shim start a logwriter, which writes a container's output to that file and bounds it, and to where a
// holder's output goes, if there is one.
func (e *Engine) outputTo(file string, also holder) string {
	arguments := url.Values{"file": {file}, "bytes": {strconv.FormatInt(e.cfg.MaxLogBytes, 10)}}
	if also.Pipe != 0 {
		arguments.Set("pipe", strconv.FormatUint(also.Pipe, 10))
		arguments.Set("of", strconv.FormatUint(uint64(also.Pid), 10))
	}
	return (&url.URL{Scheme: "binary", Path: e.launcherRoot + logWriterProgram, RawQuery: arguments.Encode()}).String()
}

// controlOf is the directory of the launcher's socket.
func (e *Engine) controlOf(id string) string { return filepath.Join(e.filesOf(id), "control") }

// writeFiles writes what the CRI would mount into a container of the sandbox, before anyone needs it; or has mounted into the holder's.
func (e *Engine) writeFiles(i *instance, s sandbox) error {
	id, host := i.id, i.pod.id
	resolv, err := resolvConf(e.cfg.ResolvConf)
	if err != nil {
		return err
	}
	dir := e.filesOf(id)
	if err := os.MkdirAll(e.controlOf(id), 0o755); err != nil {
		return fmt.Errorf("files of instance %s: %w", id, err)
	}
	hosts := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" + s.IP.String() + "\t" + host + "\n"
	output, err := os.OpenFile(e.outputOf(id), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("files of instance %s: %w", id, err)
	}
	if err := output.Close(); err != nil {
		return fmt.Errorf("files of instance %s: %w", id, err)
	}
	for name, text := range map[string][]byte{
		fileHosts: []byte(hosts), fileHostname: []byte(host + "\n"), fileResolvConf: resolv,
	} {
		if its, ok := s.Holder.Etc[name]; ok {
			text = its
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			return fmt.Errorf("files of instance %s: %w", id, err)
		}
	}
	return nil
}

// resolvConf reads the host's, or systemd-resolved's real one behind it. A host without one has Instances without one.
func resolvConf(path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("name servers for instances: %w", err)
	}
	if onlyLoopback(text) {
		if behind, err := os.ReadFile(resolvedConf); err == nil {
			text = behind
		}
	}
	return text[:min(len(text), maxResolvConf)], nil
}

// onlyLoopback tells whether every name server is one on loopback, and there is one.
func onlyLoopback(text []byte) bool {
	found := false
	for line := range bytes.Lines(text) {
		server, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "nameserver")
		if !ok {
			continue
		}
		address, err := netip.ParseAddr(strings.TrimSpace(server))
		if err == nil && !address.IsLoopback() {
			return false
		}
		found = true
	}
	return found
}
