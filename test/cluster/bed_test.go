package cluster_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/test/cluster"
)

// bed is a cluster with a probe on each node.
type bed struct {
	*cluster.Cluster
	pods map[string]string // the probes' addresses by node
	name map[string]string // and names
}

// deploy compiles the probe, which pods find in a folder of their node, and pushes an image that it can run in.
func (b *bed) deploy(t *testing.T) {
	t.Helper()
	folder := t.TempDir()
	compile := exec.Command("go", "build", "-o", filepath.Join(folder, "probe"), "./testdata/probe")
	compile.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("compile the probe: %v\n%s", err, out)
	}
	layout, err := images.Build(t.Context(), images.Config{Cache: cacheFolder()}, "pause")
	if err != nil {
		t.Fatal(err)
	}
	image := b.Registry() + "/test/base:1"
	if _, err := images.Push(t.Context(), layout, image); err != nil {
		t.Fatal(err)
	}
	manifest, err := os.ReadFile("testdata/probes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer("IMAGE", image, "FOLDER", folder).Replace(string(manifest))
	b.kubectl(t, text, "apply", "-f", "-")
	b.kubectl(t, "", "rollout", "status", "daemonset/probe", "--timeout", patience.String())
	b.findPods(t)
}

func (b *bed) findPods(t *testing.T) {
	t.Helper()
	b.pods, b.name = map[string]string{}, map[string]string{}
	out := b.kubectl(t, "", "get", "pods", "-l", "app=probe", "-o", `jsonpath={range .items[*]}{.spec.nodeName} {.status.podIP} {.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		var node, address, name string
		if _, err := fmt.Sscan(line, &node, &address, &name); err != nil {
			t.Fatalf("pods: %q: %v", out, err)
		}
		b.pods[node], b.name[node] = address, name
	}
	if len(b.pods) != len(b.Nodes()) {
		t.Fatalf("probes run on %d of %d nodes:\n%s", len(b.pods), len(b.Nodes()), out)
	}
}

func cacheFolder() string {
	if dir := os.Getenv("HEARTH_CACHE"); dir != "" {
		return dir
	}
	return filepath.Join("..", "..", ".cache")
}

func (b *bed) kubectl(t *testing.T, input string, args ...string) string {
	t.Helper()
	out, err := b.tryKubectl(t.Context(), input, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (b *bed) tryKubectl(ctx context.Context, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.Tool("kubectl"), append([]string{"--kubeconfig", b.Kubeconfig()}, args...)...)
	cmd.Stdin = strings.NewReader(input)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, errs.String())
	}
	return string(out), nil
}

// eventually tries until there is no error.
func eventually(t *testing.T, try func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return
		}
		if !host.Pause(ctx, 100*time.Millisecond) {
			t.Fatal(err)
		}
	}
}

func get(ctx context.Context, address string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return string(body), err
}

// through asks the probe of a node to ask another.
func (b *bed) through(node, address string) string {
	return "http://" + b.pods[node] + ":8080/get?url=" + url.QueryEscape(address)
}

// wants tries until an address answers one of the texts.
func wants(t *testing.T, address string, texts ...string) {
	t.Helper()
	eventually(t, func(ctx context.Context) error {
		got, err := get(ctx, address)
		if err != nil {
			return fmt.Errorf("%s: %w", address, err)
		}
		for _, text := range texts {
			if strings.Contains(got, text) {
				return nil
			}
		}
		return fmt.Errorf("%s: got %q, want one of %q", address, got, texts)
	})
}

// processesOf are all processes in the cluster's cgroups, with their cgroup.
func processesOf(t *testing.T, dir string) map[int]string {
	t.Helper()
	left, err := cluster.Leftovers(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[int]string{}
	for _, line := range left {
		root, ok := strings.CutPrefix(line, "cgroup ")
		if !ok {
			continue
		}
		_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				for _, pid := range host.Processes(path) {
					out[pid] = path
				}
			}
			return nil
		})
	}
	return out
}

// startTimes tells processes from later ones of the same id.
func startTimes(pids map[int]string) map[int]string {
	out := map[int]string{}
	for pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if words := strings.Fields(rest); len(words) > 19 && words[0] != "Z" {
			out[pid] = words[19]
		}
	}
	return out
}
