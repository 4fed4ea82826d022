package snapshotter

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// request is one Prepare that asks for a layer.
type request struct {
	*target
	key, parent string
	opts        []snapshots.Opt
	parents     []string // the parents' trees, nearest first
}

// prepareRemote brings a layer and commits it under its chain. It returns nil when that is done, or was done before. A *fallback
// says that nothing happened and containerd should do it; any other error is the answer.
func (s *Snapshotter) prepareRemote(ctx context.Context, r request) error {
	exists, err := s.inspect(ctx, &r)
	if err != nil || exists {
		return err
	}
	defer s.pin(&r)()
	s.sources.complete(r.target)
	image := sessionKey{ref: r.image, manifest: r.manifest}
	se := s.sessions.enter(image)
	if se == nil {
		se = s.sessions.enterFetched(r.target)
	}
	if se != nil {
		defer func() { s.sessions.close(ctx, se) }()
	}
	if done, err := s.commitPresent(ctx, r, se); done {
		return err
	}
	if !r.complete() {
		return errPlain
	}
	if se == nil {
		if se, err = s.sessions.open(ctx, image); err != nil {
			return classify(err, "internal")
		}
		defer func() { s.sessions.close(ctx, se) }()
	}
	err = se.trace.answered(r.diffID, s.pull(ctx, r, se))
	if fb := (*fallback)(nil); err != nil && !errors.As(err, &fb) && ctx.Err() == nil {
		s.sessions.refuse(se)
	}
	return err
}

// pull brings a layer as a part of its image.
func (s *Snapshotter) pull(ctx context.Context, r request, se *session) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.PrepareTimeout, errDeadline)
	defer cancel()
	if err := await(ctx, se.resolved); err != nil {
		return classify(err, "resolve")
	}
	if se.err != nil {
		return classify(se.err, "resolve")
	}
	l, err := se.find(r.target)
	if err != nil {
		return classify(err, "labels")
	}
	if r.diffID == "" { // containerd before 2.3
		r.diffID = l.DiffID
		defer s.pin(&r)()
	}
	return s.bring(ctx, r, se, l)
}

// pin keeps a sweep from coming between finding a tree and committing it.
func (s *Snapshotter) pin(r *request) (unpin func()) {
	var unpins []func()
	for _, name := range r.names() {
		unpins = append(unpins, s.trees.pin(name))
	}
	return func() {
		for _, unpin := range unpins {
			unpin()
		}
	}
}

// names are the trees that can serve a request.
func (r *request) names() []string {
	if r.diffID == "" {
		return nil
	}
	return []string{treeName(r.diffID, ""), treeName(r.diffID, r.chain)}
}

// inspect says whether the snapshot is there already, and checks that it can be had from here.
func (s *Snapshotter) inspect(ctx context.Context, r *request) (exists bool, err error) {
	var parentChain digest.Digest
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		if _, exists = committed(ctx, r); exists || r.parent == "" {
			return nil
		}
		_, info, _, err := storage.GetInfo(ctx, r.parent)
		if err != nil {
			return err
		}
		parentChain = digest.Digest(info.Labels[snapshots.LabelSnapshotRef])
		r.parents, err = s.chainDirs(ctx, r.parent)
		return err
	})
	if err != nil || exists {
		return exists, err
	}
	if r.parent != "" && parentChain == "" || r.diffID != "" && !r.follows(parentChain) {
		return false, &fallback{"labels", fmt.Errorf("chain %s does not follow from parent %q and diffID %s", r.chain, r.parent, r.diffID)}
	}
	return false, r.checkRoot()
}

// checkRoot refuses an image whose root directory does not belong to root: a layer without an entry for it takes its owner from
// below, which the layer's own tree cannot know.
func (r *request) checkRoot() error {
	if len(r.parents) == 0 {
		return nil
	}
	st, err := os.Stat(r.parents[0])
	if err != nil {
		return fmt.Errorf("parent %s: %w", r.parent, err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || sys.Uid != 0 || sys.Gid != 0 {
		return &fallback{"root_owner", errors.New("the root directory of the image does not belong to root")}
	}
	return nil
}

// chainDirs are the directories of a committed snapshot and those below it, nearest first. ctx has a transaction.
func (s *Snapshotter) chainDirs(ctx context.Context, name string) ([]string, error) {
	var dirs []string
	for name != "" {
		id, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, s.upperPath(id))
		name = info.Parent
	}
	return dirs, nil
}

// commitPresent commits the layer from a tree on the disk, if there is one.
func (s *Snapshotter) commitPresent(ctx context.Context, r request, se *session) (done bool, err error) {
	for _, name := range r.names() {
		info, err := s.trees.stat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return true, err
		}
		start := time.Now()
		err = s.commitRemote(ctx, r, name, info)
		if se != nil && err == nil {
			se.trace.add(phaseCommit, start, time.Now())
			s.metrics.phase(phaseCommit, time.Since(start))
			s.sessions.prepared(ctx, se, r.diffID)
		}
		return true, err
	}
	return false, nil
}

// commitName is the backend's name of the snapshot. Another namespace, or a chain whose lower part was pulled by containerd
// itself, can have other parents for the same chain, and containerd finds the snapshot by its label and parent, not by its name.
func commitName(r *request, own bool) string {
	if !own {
		return r.chain.String()
	}
	return fmt.Sprintf("%s@%x", r.chain, sha256.Sum256([]byte(r.parent)))
}

// committed says whether there is a snapshot that containerd would find, or else under which name it can be. ctx has a transaction.
func committed(ctx context.Context, r *request) (free string, found bool) {
	for _, own := range []bool{false, true} {
		name := commitName(r, own)
		_, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			if free == "" {
				free = name
			}
			continue
		}
		if info.Kind == snapshots.KindCommitted && info.Parent == r.parent && info.Labels[snapshots.LabelSnapshotRef] == r.chain.String() {
			return name, true
		}
	}
	return free, false
}

// commitRemote makes a committed snapshot of a tree, in one transaction. The tree is pinned.
func (s *Snapshotter) commitRemote(ctx context.Context, r request, tree string, info treeInfo) (err error) {
	var dir string
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		name, found := committed(ctx, &r)
		if found {
			return nil
		}
		if name == "" {
			return fmt.Errorf("snapshots of chain %s: names are taken: %w", r.chain, errdefs.ErrFailedPrecondition)
		}
		sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, r.key, r.parent, r.opts...)
		if err != nil {
			return err
		}
		dir = s.snapshotPath(sn.ID)
		if err := s.link(dir, tree); err != nil {
			return err
		}
		_, err = storage.CommitActive(ctx, r.key, name, info.usage(), r.opts...)
		return err
	})
	if err != nil && dir != "" {
		err = errors.Join(err, discard(s.cfg.Root, dir))
	}
	if err != nil {
		return fmt.Errorf("commit chain %s: %w", r.chain, err)
	}
	return nil
}

// link makes a snapshot's directory that points to a tree, durably.
func (s *Snapshotter) link(dir, tree string) error {
	if err := discard(s.cfg.Root, dir); err != nil { // of a transaction that was rolled back
		return err
	}
	if err := makeDir(dir, 0o700); err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join("..", "..", "layers", tree, "fs"), filepath.Join(dir, "fs")); err != nil {
		return err
	}
	if err := syncFile(dir); err != nil {
		return err
	}
	return syncFile(filepath.Dir(dir))
}
