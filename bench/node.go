package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"text/template"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// node is a containerd that images are pulled into: with its defaults, or with nodeagent as its snapshotter.
type node struct {
	tools, dir, socket, snapshotter string
	conn                            *grpc.ClientConn
	stop                            func() error
	// processes, as they are now: containerd, and nodeagent if there is one.
	processes func() (containerd, agent int, err error)
}

// defaults is the least that a containerd needs to stand beside others; all else is as containerd has it.
const defaults = `version = 3
root = {{printf "%q" .Root}}
state = {{printf "%q" .State}}
[grpc]
  address = {{printf "%q" .Socket}}
[ttrpc]
  address = {{printf "%q" .TTRPC}}
[plugins.'io.containerd.internal.v1.opt']
  path = {{printf "%q" .Opt}}
`

// startNode starts the system called system with all its data in dir.
func startNode(ctx context.Context, o *Options, dir, system string) (*node, error) {
	start := startDefaults
	if system == "hearth" {
		start = startHearth
	}
	n, err := start(ctx, o, dir)
	if err != nil {
		return nil, err
	}
	if n.conn, err = grpc.NewClient("unix://"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to containerd: %w", err), n.stop())
	}
	// The CRI service starts last: its answer means that all of containerd is up.
	ready, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if _, err = cri.NewImageServiceClient(n.conn).ImageFsInfo(ready, &cri.ImageFsInfoRequest{}, grpc.WaitForReady(true)); err != nil {
		return nil, errors.Join(fmt.Errorf("await containerd's CRI: %w", err), n.stop())
	}
	return n, nil
}

// startHearth brings up the whole of Hearth on one machine, with an empty pool.
func startHearth(ctx context.Context, o *Options, dir string) (*node, error) {
	st, err := startStack(ctx, o, dir, stackOptions{pool: -1})
	if err != nil {
		return nil, err
	}
	return &node{
		tools: o.Tools, dir: dir, socket: st.containerdSocket(), snapshotter: "hearth", stop: st.stop,
		processes: func() (int, int, error) {
			containerd, err := st.pid("containerd")
			if err != nil {
				return 0, 0, err
			}
			agent, err := st.pid("nodeagent")
			return containerd, agent, err
		},
	}, nil
}

func startDefaults(ctx context.Context, o *Options, dir string) (*node, error) {
	n := &node{tools: o.Tools, dir: dir, socket: filepath.Join(dir, "c.sock"), snapshotter: "overlayfs"}
	config := filepath.Join(dir, "config.toml")
	err := render(config, defaults, map[string]string{
		"Root": filepath.Join(dir, "root"), "State": filepath.Join(dir, "state"), "Opt": filepath.Join(dir, "opt"),
		"Socket": n.socket, "TTRPC": n.socket + ".ttrpc",
	})
	if err != nil {
		return nil, err
	}
	p, err := startProcess(dir, filepath.Join(o.Tools, "containerd"), "--config", config)
	if err != nil {
		return nil, err
	}
	n.stop = func() error { p.stop(); return nil }
	n.processes = func() (int, int, error) { return p.cmd.Process.Pid, 0, nil }
	if err := p.await(ctx, "unix", n.socket); err != nil {
		return nil, errors.Join(err, n.stop())
	}
	return n, nil
}

// render writes a configuration.
func render(file, text string, values any) error {
	t, err := template.New(filepath.Base(file)).Funcs(template.FuncMap{"json": func(s string) string { return fmt.Sprintf("%q", s) }}).Parse(text)
	if err != nil {
		return fmt.Errorf("parse configuration: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, values); err != nil {
		return fmt.Errorf("render configuration: %w", err)
	}
	return os.WriteFile(file, out.Bytes(), 0o600)
}

// pull is the kubelet's own call.
func (n *node) pull(ctx context.Context, ref string) (time.Duration, error) {
	start := time.Now()
	_, err := cri.NewImageServiceClient(n.conn).PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		return 0, fmt.Errorf("pull %s: %w", ref, err)
	}
	return time.Since(start), nil
}

// addMemory files the peak memory of the system's own process, and of containerd beside nodeagent.
func (n *node) addMemory(r *Report, name, system string) error {
	containerd, agent, err := n.processes()
	if err != nil {
		return err
	}
	resident, err := peakRSS(containerd)
	if err != nil {
		return err
	}
	if agent == 0 {
		r.Add(name, system, "peak_rss", "bytes", resident)
		return nil
	}
	r.Add(name, system, "peak_rss_containerd", "bytes", resident)
	if resident, err = peakRSS(agent); err != nil {
		return err
	}
	r.Add(name, system, "peak_rss", "bytes", resident)
	return nil
}

// tree reads what a container of the image would see.
func (n *node) tree(ctx context.Context, ref string) (tree map[string]string, err error) {
	mnt := filepath.Join(n.dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return nil, fmt.Errorf("read the tree of %s: %w", ref, err)
	}
	ctr := func(args ...string) error {
		argv := append([]string{"--address", n.socket, "--namespace", "k8s.io", "images"}, args...)
		if out, err := exec.CommandContext(ctx, filepath.Join(n.tools, "ctr"), argv...).CombinedOutput(); err != nil {
			return fmt.Errorf("ctr images %s: %w: %s", args[0], err, out)
		}
		return nil
	}
	if err := ctr("mount", "--snapshotter", n.snapshotter, ref, mnt); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ctr("unmount", "--rm", "--snapshotter", n.snapshotter, mnt)) }()
	return Tree(mnt)
}
