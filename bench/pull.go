package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hearth-serverless/hearth/deploy"
)

const (
	// quickTime is what a quick run has, with the building of images that were not cached; it makes quickLeast rounds at least.
	quickTime  = 110 * time.Second
	quickLeast = 2
)

// pullSuite pulls each image by the kubelet's own call, CRI PullImage, into a containerd on a new file system in memory:
// once with containerd's defaults, once with nodeagent as its snapshotter. The image comes from a registry on loopback, whose
// blobs are in the page cache for both. pull_time ends when the image is unpacked; hearth's includes making it durable, which
// containerd's defaults leave out. peak_rss is containerd's, and for hearth nodeagent's, where containerd's own is given as
// peak_rss_containerd beside it. In the first round the trees of both are compared, file by file.
func pullSuite(ctx context.Context, o *Options, r *Report) (err error) {
	started := time.Now()
	memory, end, err := memoryDir(os.TempDir())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	reg, err := startRegistry(ctx, o, memory)
	if err != nil {
		return err
	}
	defer func() {
		reg.process.stop()
		err = errors.Join(err, os.RemoveAll(filepath.Join(memory, "registry")))
	}()
	cases := o.Images
	if len(cases) == 0 {
		cases = []string{"python", "java", "node", "go"}
	}
	refs := map[string]string{}
	for _, name := range cases {
		if refs[name], err = o.push(ctx, reg.address, name); err != nil {
			return err
		}
	}
	rounds, pulling := o.rounds(3, 10), time.Now()
	for round := range rounds {
		if o.Quick && round >= quickLeast && time.Since(started)+time.Since(pulling)/time.Duration(round) > quickTime {
			break // there is no time for another
		}
		for _, name := range cases {
			if err := pullRound(ctx, o, r, memory, round, rounds, name, refs[name]); err != nil {
				return fmt.Errorf("pull %s, round %d: %w", name, round+1, err)
			}
		}
	}
	return nil
}

// pullRound pulls one image with both systems, each second round in the other order.
func pullRound(ctx context.Context, o *Options, r *Report, memory string, round, rounds int, name, ref string) error {
	systems := []string{"hearth", "containerd"}
	if round%2 == 1 {
		slices.Reverse(systems)
	}
	trees := map[string]map[string]string{}
	for _, system := range systems {
		took, tree, err := pullOnce(ctx, o, r, memory, name, system, ref, round == 0)
		if err != nil {
			return fmt.Errorf("%s: %w", system, err)
		}
		trees[system] = tree
		o.say("round %d of %d: %-7s %-11s %.2f s", round+1, rounds, name, system, took.Seconds())
	}
	if diff := Differences(trees["containerd"], trees["hearth"], 10); len(diff) > 0 {
		return fmt.Errorf("the trees differ (containerd's first): %q", diff)
	}
	if n := len(trees["hearth"]); n > 0 {
		o.say("%s: %d files, identical in both", name, n)
	}
	return nil
}

// pullOnce pulls ref on a new file system and, if asked to, reads the tree that came of it.
func pullOnce(ctx context.Context, o *Options, r *Report, memory, name, system, ref string, compare bool) (took time.Duration, tree map[string]string, err error) {
	fs, err := newScratch(ctx, memory)
	if err != nil {
		return 0, nil, err
	}
	defer func() { err = errors.Join(err, fs.remove()) }()
	n, err := startNode(ctx, o, fs.Dir, system)
	if err != nil {
		return 0, nil, err
	}
	defer func() { err = errors.Join(err, n.conn.Close(), n.stop()) }()
	if took, err = n.pull(ctx, ref); err != nil {
		return 0, nil, err
	}
	r.Add(name, system, "pull_time", "s", took.Seconds())
	if err := n.addMemory(r, name, system); err != nil {
		return 0, nil, err
	}
	if compare {
		tree, err = n.tree(ctx, ref)
	}
	return took, tree, err
}

// localRegistry is a registry on loopback.
type localRegistry struct {
	process *process
	address string
}

// startRegistry starts a registry with its data below dir.
func startRegistry(ctx context.Context, o *Options, dir string) (*localRegistry, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "registry.yaml")
	err = render(config, deploy.Registry, map[string]string{"RegistryRoot": filepath.Join(dir, "registry"), "RegistryAddress": address})
	if err != nil {
		return nil, err
	}
	p, err := startProcess(dir, filepath.Join(o.Tools, "registry"), "serve", config)
	if err != nil {
		return nil, err
	}
	if err := p.await(ctx, "tcp", address); err != nil {
		p.stop()
		return nil, err
	}
	return &localRegistry{process: p, address: address}, nil
}
