package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/internal/stack"
)

// node is a containerd that images are pulled into, with whoever is its snapshotter.
type node struct {
	tools, dir, socket, snapshotter string
	conn                            *grpc.ClientConn
	images                          *grpc.ClientConn // where a kubelet asks for images: containerd, or who stands before it
	stop                            func() error
	// processes as they are now: the one that does the work, which is containerd if it has no helper, and then the others.
	processes func() ([]int, error)
	// fetched is what a node that tells has fetched so far; nil for others.
	fetched func(context.Context) (fetching, error)
}

// startNode starts the system called system with all its data in dir, to pull from registry.
func startNode(ctx context.Context, o *Options, dir, system, registry string) (*node, error) {
	start, ok := systems()[system]
	if !ok {
		return nil, fmt.Errorf("there is no system %q", system)
	}
	n, err := start(ctx, o, dir, registry)
	if err != nil {
		return nil, err
	}
	if n.conn, err = grpc.NewClient("unix://"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to containerd: %w", err), n.stop())
	}
	if n.images == nil {
		n.images = n.conn
	}
	if err := n.ready(ctx); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

// ready waits for the CRI service, which starts last: its answer means that all of containerd is up.
func (n *node) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if _, err := cri.NewImageServiceClient(n.images).ImageFsInfo(ctx, &cri.ImageFsInfoRequest{}, grpc.WaitForReady(true)); err != nil {
		return fmt.Errorf("await containerd's CRI: %w", err)
	}
	return nil
}

func (n *node) close() error {
	errs := []error{n.conn.Close()}
	if n.images != n.conn {
		errs = append(errs, n.images.Close())
	}
	return errors.Join(append(errs, n.stop())...)
}

// startHearth brings up the whole of Hearth on one machine, with an empty pool.
func startHearth(ctx context.Context, o *Options, dir, _ string) (*node, error) {
	st, err := startStack(ctx, o, dir, stackOptions{pool: -1})
	if err != nil {
		return nil, err
	}
	images, err := grpc.NewClient("unix://"+filepath.Join(st.status.Run, stack.ImageSocket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to nodeagent: %w", err), st.stop())
	}
	return &node{
		tools: o.Tools, dir: dir, socket: st.containerdSocket(), images: images, snapshotter: "hearth", stop: st.stop,
		processes: func() ([]int, error) {
			agent, err := st.pid("nodeagent")
			if err != nil {
				return nil, err
			}
			containerd, err := st.pid("containerd")
			return []int{agent, containerd}, err
		},
		fetched: func(ctx context.Context) (fetching, error) {
			admin, err := st.admin("nodeagent")
			if err != nil {
				return fetching{}, err
			}
			return fetched(ctx, admin)
		},
	}, nil
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
	_, err := cri.NewImageServiceClient(n.images).PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		return time.Since(start), fmt.Errorf("pull %s: %w", ref, err)
	}
	return time.Since(start), nil
}

// remove forgets an image; its snapshots go with containerd's next collection of garbage.
func (n *node) remove(ctx context.Context, ref string) error {
	_, err := cri.NewImageServiceClient(n.conn).RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		return fmt.Errorf("remove %s: %w", ref, err)
	}
	return nil
}

// endLeases ends what keeps the leftovers of pulls for a day that were under way when containerd was killed.
func (n *node) endLeases(ctx context.Context) error {
	out, err := n.ctrOutput(ctx, "leases", "list", "--quiet")
	if err != nil {
		return err
	}
	for id := range strings.FieldsSeq(out) {
		if err := n.ctr(ctx, "leases", "delete", "--sync", id); err != nil {
			return err
		}
	}
	return nil
}

// ctr runs containerd's own client in the CRI's namespace.
func (n *node) ctr(ctx context.Context, args ...string) error {
	_, err := n.ctrOutput(ctx, args...)
	return err
}

func (n *node) ctrOutput(ctx context.Context, args ...string) (string, error) {
	argv := append([]string{"--address", n.socket, "--namespace", "k8s.io"}, args...)
	var out, problems bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(n.tools, "ctr"), argv...)
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("ctr %s: %w: %s", args[0], err, problems.Bytes())
	}
	return out.String(), nil
}

// run starts a container of an image that was pulled, waits until its process listens, ends it, and returns the time from the
// beginning to the listening. Every system's container is started by containerd's own client, on the machine's network.
func (n *node) run(ctx context.Context, ref string) (took time.Duration, err error) {
	const id = "hearth-bench"
	address, err := freeAddress()
	if err != nil {
		return 0, err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	start := time.Now()
	err = n.ctr(ctx, "run", "--detach", "--net-host", "--snapshotter", n.snapshotter, "--env", "PORT="+port, "--null-io",
		"--cgroup", "/"+id, "--runc-binary", filepath.Join(n.tools, "runc"), ref, id)
	if err != nil {
		return 0, err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		err = errors.Join(err, n.ctr(clean, "tasks", "delete", "--force", id), n.ctr(clean, "containers", "delete", id))
	}()
	if err := awaitListener(ctx, address, awaitPause); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}

// tree reads what a container of the image would see.
func (n *node) tree(ctx context.Context, ref string) (tree map[string]string, err error) {
	mnt, err := os.MkdirTemp(n.dir, "mnt-") // containerd remembers a path for longer than it is mounted
	if err != nil {
		return nil, fmt.Errorf("read the tree of %s: %w", ref, err)
	}
	if err := n.ctr(ctx, "images", "mount", "--snapshotter", n.snapshotter, ref, mnt); err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, n.ctr(ctx, "images", "unmount", "--rm", "--snapshotter", n.snapshotter, mnt), os.Remove(mnt))
	}()
	return Tree(mnt)
}
