package cluster_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/test/cluster"
)

func TestNetwork(t *testing.T) {
	whole, parts, err := cluster.ChosenNetwork("/a", nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range parts {
		if !whole.Overlaps(p) || p.Bits() <= whole.Bits() {
			t.Errorf("%s is not in %s", p, whole)
		}
		for _, q := range parts[:i] {
			if p.Overlaps(q) {
				t.Errorf("%s overlaps %s", p, q)
			}
		}
	}
	other, _, err := cluster.ChosenNetwork("/a", []netip.Prefix{parts[0]})
	if err != nil || other.Overlaps(whole) {
		t.Errorf("chose %s (%v) where %s is taken", other, err, whole)
	}
	if _, _, err := cluster.ChosenNetwork("/a", []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}); err == nil {
		t.Error("chose a network where none is free")
	}
	last, machines, pods := cluster.LastMachine()
	if !machines.Contains(last) || pods.Contains(last) {
		t.Errorf("the last node's address is %s, machines have %s, pods %s", last, machines, pods)
	}
}

func TestConfigs(t *testing.T) {
	dir := t.TempDir()
	for _, name := range cluster.Configs() {
		path, err := cluster.Rendered(dir, name)
		if err != nil {
			t.Error(err)
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var v map[string]any
		switch filepath.Ext(name) {
		case ".yaml":
			err = yaml.Unmarshal(text, &v)
		case ".conflist":
			err = json.Unmarshal(text, &v)
		}
		if err != nil || strings.Contains(string(text), "{{") || strings.Contains(string(text), "invalid ") {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
}

// The administrator's client reaches a server with a certificate of the cluster's authority, which knows it by its own.
func TestIdentities(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		subject := r.TLS.PeerCertificates[0].Subject
		_, _ = w.Write([]byte(subject.CommonName + " " + strings.Join(subject.Organization, " ")))
	}))
	serving, ca, config, err := cluster.Issue(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(serving.PEM())
	if err != nil {
		t.Fatal(err)
	}
	server.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca}
	server.StartTLS()
	defer server.Close()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		t.Fatal(err)
	}
	client, address, err := cluster.Administrator(path)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got := make([]byte, 100)
	n, _ := resp.Body.Read(got)
	if string(got[:n]) != "client group" {
		t.Errorf("the server knows the client as %q", got[:n])
	}
}

// A machine needs no Kubernetes: it has folders, a host name and a network of its own, keeps programs running, and goes with its
// processes.
func TestMachine(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp("/tmp", "hearth-machine-")
	if err != nil {
		t.Fatal(err)
	}
	m := cluster.NewMachine(dir)
	t.Cleanup(func() {
		if err := cluster.Down(context.Background(), dir); err != nil && !errors.Is(err, cluster.ErrDown) {
			t.Error(err)
		}
		_ = os.RemoveAll(dir)
	})
	if err := m.Boot(); err != nil {
		t.Fatal(err)
	}
	err = m.Enter(func() error {
		name, err := os.Hostname()
		if err != nil || name != "control" {
			t.Errorf("it calls itself %q (%v)", name, err)
		}
		if _, err := os.Stat("/etc/passwd"); err != nil {
			t.Error(err)
		}
		links, err := os.ReadDir("/sys/class/net")
		if err != nil || len(links) == 0 || links[0].Name() != "lo" && len(links) == 1 {
			t.Errorf("it has the links %v (%v), want its loopback", links, err)
		}
		return os.WriteFile("/var/lib/own", nil, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "control/var/lib/own")); err != nil {
		t.Errorf("what is written to /var is not in the machine's folder: %v", err)
	}
	if mounts, err := os.ReadFile(host.MountInfo); err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("the host has mounts of the machine (%v)", err)
	}
	if err := m.Run("ends", "/bin/sh", "-c", "echo said; exit 3"); err != nil {
		t.Fatal(err)
	}
	err = m.Await(t.Context(), "ends")
	if err == nil || !strings.Contains(err.Error(), "said") || !strings.Contains(err.Error(), m.Log("ends")) || m.Restarts("ends") < 5 {
		t.Errorf("a program that ends: %v", err)
	}
	if err := m.Run("stays", "/bin/sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(t.Context(), "stays"); err != nil || len(m.Processes("stays")) > 0 {
		t.Errorf("stopped, it has the processes %v (%v)", m.Processes("stays"), err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := m.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.Enter(func() error { return nil }); err == nil {
		t.Error("a machine that is gone can be entered")
	}
}

// What a folder holds that is no cluster's is not touched.
func TestForeignFolder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "nodes")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := cluster.Config{Dir: dir, Tools: []string{"/none"}}
	if _, err := cluster.Start(t.Context(), config); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("start in a folder that is not empty: %v", err)
	}
	if err := cluster.Down(t.Context(), dir); !errors.Is(err, cluster.ErrDown) {
		t.Errorf("down of a folder without a cluster: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	config.Dir = open
	if _, err := cluster.Start(t.Context(), config); err == nil || !strings.Contains(err.Error(), "only root") {
		t.Errorf("start in a folder that anybody may write to: %v", err)
	}
	if _, err := cluster.Open(open); err == nil || !strings.Contains(err.Error(), "make cluster") {
		t.Errorf("open a folder without a cluster: %v", err)
	}
	if err := os.WriteFile(filepath.Join(open, "cluster.json"), []byte("{}"), 0o600); err != nil { // as whoever may write there could
		t.Fatal(err)
	}
	if err := cluster.Down(t.Context(), open); !errors.Is(err, cluster.ErrDown) {
		t.Errorf("down of a folder that anybody may write to: %v", err)
	}
	for _, nodes := range []int{-1, cluster.MaxNodes + 1} {
		if _, err := cluster.Start(t.Context(), cluster.Config{Dir: open, Tools: []string{"/none"}, Nodes: nodes}); err == nil || !strings.Contains(err.Error(), "1 to") {
			t.Errorf("start %d nodes: %v", nodes, err)
		}
	}
}
