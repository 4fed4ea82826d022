package instance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// reconcileTime bounds one comparison.
const reconcileTime = 30 * time.Second

// adoptedAtOnce is for how many Instances of a former engine containerd and they themselves are asked at once. What it asks has
// reconcileTime, and each silent one takes greetTime: a node would need hundreds of them to stay closed.
const adoptedAtOnce = 256

// unknownStatus stands for the exit status of a process whose end nobody saw.
const unknownStatus = 255

// survey is what containerd holds of ours.
type survey struct {
	sandboxes  map[string][]sandbox     // by pod
	containers map[string]containerInfo // by Instance
	shared     map[string]bool          // pods with workers
	snapshots  []string
}

func (e *Engine) survey(ctx context.Context) (*survey, error) {
	containers, err := e.backend.Containers(ctx)
	if err != nil {
		return nil, err
	}
	boxes, err := e.backend.Sandboxes(ctx)
	if err != nil {
		return nil, err
	}
	keys, err := e.backend.PreparedSnapshots(ctx)
	if err != nil {
		return nil, err
	}
	s := &survey{sandboxes: map[string][]sandbox{}, containers: map[string]containerInfo{}, shared: map[string]bool{}, snapshots: keys}
	for _, c := range containers {
		s.containers[c.Labels[labelInstance]] = c
		s.shared[c.Labels[labelPod]] = true
	}
	for _, b := range boxes {
		s.sandboxes[b.Pod] = append(s.sandboxes[b.Pod], b)
	}
	return s, nil
}

// ids are those of all Instances that the survey has seen something of. A pod in which workers are is theirs, and no sign of the
// Instance that it was made for; neither is one of the kubelet's in which nothing of ours is, which it keeps for as long as it likes.
func (s *survey) ids() map[string]bool {
	ids := map[string]bool{}
	for id, boxes := range s.sandboxes {
		if !s.shared[id] && !boxes[0].Foreign {
			ids[id] = true
		}
	}
	for id := range s.containers {
		ids[id] = true
	}
	return ids
}

// reconcile makes containerd and the engine agree: the first time by rebuilding the engine's state, later by ending Instances of
// which something is missing and removing what belongs to none.
func (e *Engine) reconcile(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, reconcileTime)
	defer cancel()
	if err := e.backend.Ready(bounded); err != nil {
		return err
	}
	before := e.seen()
	s, err := e.survey(bounded)
	if err != nil {
		return err
	}
	if e.open() != nil {
		if err := e.rebuild(bounded, s); err != nil {
			return err
		}
		if err := errors.Join(e.cleanFiles(), e.cleanLauncherRoots()); err != nil {
			e.log.Warn("files of former instances not removed", "error", err)
		}
		close(e.opened)
		e.log.Info("state rebuilt", "instances", len(e.all()))
	} else {
		e.compare(s, before)
	}
	e.removeSnapshots(bounded, s)
	e.metrics.prepared.Set(float64(e.shelf.count()))
	if err := e.logs.trim(); err != nil {
		e.log.Warn("logs not trimmed", "error", err)
	}
	return nil
}

// seen returns the version of every Instance, and 0 for a pod whose own has gone.
func (e *Engine) seen() map[string]int64 {
	all := map[string]int64{}
	e.mu.Lock()
	for id := range e.pods {
		all[id] = 0
	}
	e.mu.Unlock()
	for _, i := range e.all() {
		i.mu.Lock()
		all[i.id] = i.version
		i.mu.Unlock()
	}
	return all
}

// rebuild takes over what a former engine left, many Instances at once: those that say nothing cost their own time and no other's,
// or as many of them as fill reconcileTime would have every attempt fail.
func (e *Engine) rebuild(ctx context.Context, s *survey) error {
	var mu sync.Mutex // guards found
	e.mu.Lock()
	clear(e.pods) // of an attempt that was broken off
	e.mu.Unlock()
	var found []*instance
	work, adopting := errgroup.WithContext(ctx)
	work.SetLimit(adoptedAtOnce)
	for id := range s.ids() {
		if checkInstanceID(id) != nil {
			e.log.Error("sandbox or container with a malformed instance label is left alone", "instance", id)
			continue
		}
		work.Go(func() error {
			i, err := e.adopt(adopting, s, id)
			mu.Lock()
			found = append(found, i)
			mu.Unlock()
			if errdefs.IsUnavailable(err) || errors.Is(err, context.DeadlineExceeded) || adopting.Err() != nil {
				return errors.Join(err, adopting.Err()) // containerd is away again: begin anew rather than discard what may be well
			}
			if err != nil {
				e.log.Warn("instance of a former engine cannot be adopted", "instance", id, "error", err)
			}
			return nil
		})
	}
	if err := work.Wait(); err != nil {
		for _, i := range found {
			i.letGo()
		}
		return err
	}
	for _, i := range found {
		e.install(i)
	}
	return nil
}

// adopt makes an Instance of what is there: Warm, Serving, Frozen or, with the reason as error, one that has to be discarded.
func (e *Engine) adopt(ctx context.Context, s *survey, id string) (*instance, error) {
	c := s.containers[id]
	i, err := e.orphan(id, c)
	if err != nil {
		return i, err
	}
	boxes := s.sandboxes[i.pod.id]
	if len(boxes) != 1 || !boxes[0].Ready {
		return i, fmt.Errorf("it has %d sandboxes or one that has ended", len(boxes))
	}
	if !c.Running {
		return i, errors.New("its container does not run")
	}
	box, err := e.backend.Inspect(ctx, boxes[0].ID)
	if err != nil {
		return i, err
	}
	e.cgroups.learnt.learn(i.pod.id, box.Holder.Group)
	if err := e.writeFiles(i, box); err != nil {
		return i, err
	}
	i.pod.made(box)
	i.sandbox, i.created = box, box.Created
	runs, err := e.cgroups.thawed(i.place())
	if err != nil {
		return i, err
	}
	if i.claim == nil {
		return i, e.adoptUnclaimed(ctx, i, runs)
	}
	return i, e.adoptClaimed(ctx, i, c, runs)
}

// adoptUnclaimed takes over an Instance that waits for a claim.
func (e *Engine) adoptUnclaimed(ctx context.Context, i *instance, runs bool) error {
	if !runs {
		return errors.New("it is frozen and nothing is recorded of it")
	}
	if err := e.adoptSidecar(ctx, i, ""); err != nil {
		return err
	}
	if i.booted != nil {
		return e.adoptBooted(ctx, i)
	}
	var err error
	if i.launcher, err = e.backend.FindTask(ctx, e.container(i.id)); err == nil {
		i.state = hearthv1.State_STATE_WARM
	}
	return err // it was claimed and had not come to be recorded, if the launcher is no more
}

// adoptClaimed takes over an Instance that serves, or that was frozen when it had served.
func (e *Engine) adoptClaimed(ctx context.Context, i *instance, c containerInfo, runs bool) error {
	if i.revision.Port == 0 {
		return errors.New("its labels are not complete")
	}
	if runs && c.Labels[labelFrozen] != "" {
		return errors.New("it was thawed, and nobody has recorded by which claim")
	}
	if i.booted != nil {
		if err := e.findLoader(ctx, i); err != nil {
			return err
		}
	}
	if err := e.adoptSidecar(ctx, i, i.revision.Name); err != nil {
		return err
	}
	i.address = i.endpoint().String()
	if i.sidecar != nil {
		i.address = sidecarAddress(i.sandbox.IP, i.revision).String()
	}
	if !runs {
		return e.adoptFrozen(ctx, i, c)
	}
	i.state = hearthv1.State_STATE_SERVING
	i.start = &activation{
		claim: i.claim, revision: i.revision, trace: newTrace(time.Now()), done: make(chan struct{}), answer: i.proto(e.cfg.Node),
	}
	close(i.start.done)
	return nil
}

// adoptFrozen takes over an Instance whose freezer holds it. It may not have come to a stop yet, and it may not have been noted:
// then it is noted first, for the next claim thaws it before it is recorded.
func (e *Engine) adoptFrozen(ctx context.Context, i *instance, c containerInfo) error {
	since, err := time.Parse(time.RFC3339Nano, c.Labels[labelFrozen])
	if err != nil {
		since = time.Now()
		if err := e.noteFrozen(ctx, i.id, since); err != nil {
			return err
		}
	}
	used, err := e.hold(ctx, i)
	if err != nil {
		return fmt.Errorf("it does not freeze: %s", err) // its kind is nothing of containerd's
	}
	i.state = hearthv1.State_STATE_FROZEN
	i.frozen = frozen{since: since, claim: i.claim.GetId(), bytes: used}
	return nil
}

// orphan is an Instance of which nothing is known but what its container's labels say. Its state is Draining. It is an error if they
// are of somebody who cannot be in that pod.
func (e *Engine) orphan(id string, c containerInfo) (*instance, error) {
	in := podOf(c.Labels)
	if checkInstanceID(in) != nil {
		in = id // it has no container, or one with labels that are not ours
	}
	i := newInstance(id, e.podThere(in))
	i.slot, _ = strconv.Atoi(c.Labels[labelSlot]) // 0 when malformed, as the first has it
	i.state = hearthv1.State_STATE_DRAINING
	close(i.warm)
	close(i.recorded)
	i.pid = c.Pid
	i.version, _ = strconv.ParseInt(c.Labels[labelVersion], 10, 64) // 0 when malformed: none
	i.image, i.chainID, i.snapshot = c.Labels[labelImage], c.Labels[labelChain], c.Snapshot
	e.cgroups.learnt.learn(i.pod.id, c.Labels[labelCgroup]) // its sandbox may be no more
	i.booted = bootedBefore(i, c.Labels)
	whose := owner{tenant: c.Labels[labelTenant], group: c.Labels[labelGroup]}
	if c.Labels[labelClaim] == "" {
		return i, i.pod.restore(id, i.slot, whose)
	}
	if key := c.Labels[labelCode]; key != "" {
		i.code = &codeView{key: key, chainID: c.Labels[labelCodeChain]}
	}
	epoch, _ := strconv.ParseInt(c.Labels[labelEpoch], 10, 64) // 0 when malformed: the lowest
	port, _ := strconv.ParseUint(c.Labels[labelPort], 10, 16)
	cpu, _ := strconv.ParseInt(c.Labels[labelCPU], 10, 64)
	i.claim = &hearthv1.Claim{Id: c.Labels[labelClaim], Epoch: epoch}
	i.revision = &hearthv1.Revision{
		Name: c.Labels[labelRevision], Function: c.Labels[labelFunction], Image: c.Labels[labelImage], Port: int32(port),
		Resources: &hearthv1.Resources{CpuMillis: cpu}, Tenant: whose.tenant, Group: whose.group,
	}
	return i, i.pod.restore(id, i.slot, ownerOf(i.revision, id))
}

// install makes an adopted Instance known, and has it discarded if that is what became of it.
func (e *Engine) install(i *instance) {
	e.mu.Lock()
	e.instances[i.id] = i
	e.mu.Unlock()
	if i.snapshot != "" {
		e.shelf.hold(i.snapshot)
	}
	if i.code != nil {
		e.codes.adopt(i.code)
	}
	_ = e.admit(max(i.claim.GetEpoch(), 0)) // one that is lower than another's changes nothing
	e.versions.seen(i.version)
	i.mu.Lock()
	state := i.state
	if state == hearthv1.State_STATE_FROZEN {
		i.claim = nil // it is over
	}
	i.state = hearthv1.State_STATE_UNSPECIFIED
	e.advance(i, state)
	if state == hearthv1.State_STATE_CREATING {
		e.greetAdopted(i)
	}
	side := i.sidecar
	i.mu.Unlock()
	if side != nil {
		e.followSidecar(i, side)
	}
	switch state {
	case hearthv1.State_STATE_DRAINING:
		e.end(i, hearthv1.State_STATE_DRAINING, 0)
	case hearthv1.State_STATE_SERVING, hearthv1.State_STATE_FROZEN:
		e.limitCPU(i, i.revision.GetResources().GetCpuMillis())
		e.show(i)
		fallthrough
	case hearthv1.State_STATE_WARM:
		e.watchProcess(i, i.pid)
	}
}

// compare looks for what nobody told. before is how things stood before containerd was asked, so that what changed since is not
// taken for a difference.
func (e *Engine) compare(s *survey, before map[string]int64) {
	for _, i := range e.all() {
		i.mu.Lock()
		state, version, box := i.state, i.version, i.sandbox.ID
		i.mu.Unlock()
		if version == before[i.id] && state >= hearthv1.State_STATE_WARM && state < hearthv1.State_STATE_DRAINING {
			e.compareOne(i, s, state, version, box)
		}
	}
	for id := range s.ids() {
		if _, was := before[id]; was || e.live(id) || e.hasPod(id) || checkInstanceID(id) != nil {
			continue
		}
		i, err := e.orphan(id, s.containers[id])
		e.log.Warn("sandbox or container of no instance is removed", "instance", id, "error", err)
		e.install(i)
	}
}

// compareOne ends an Instance of which something is missing.
func (e *Engine) compareOne(i *instance, s *survey, state hearthv1.State, version int64, box string) {
	c, ok := s.containers[i.id]
	switch {
	case !alive(s.sandboxes[i.pod.id], box):
		e.log.Warn("sandbox has gone", "instance", i.id)
		e.end(i, hearthv1.State_STATE_GONE, 0)
	case c.Ended, state != hearthv1.State_STATE_CLAIMED && !(ok && c.Running):
		e.processEnded(i, unknownStatus)
	case state == hearthv1.State_STATE_FROZEN:
		if runs, err := e.cgroups.thawed(i.place()); err == nil && runs {
			e.endFrozen(i, version, "somebody else has thawed it")
		}
	}
}

// alive tells whether a sandbox is among those that were found, and ready.
func alive(found []sandbox, id string) bool {
	for _, s := range found {
		if s.ID == id {
			return s.Ready
		}
	}
	return false
}

// removeSnapshots removes prepared snapshots that are on nobody's list: those of a former engine.
func (e *Engine) removeSnapshots(ctx context.Context, s *survey) {
	for _, key := range s.snapshots {
		if e.shelf.knows(key) || e.codes.knows(key) {
			continue
		}
		if err := e.backend.RemoveSnapshot(ctx, key); err != nil {
			e.log.Warn("snapshot of a former engine not removed", "key", key, "error", err)
		}
	}
}

// cleanFiles removes the directories of Instances that are not there any more.
func (e *Engine) cleanFiles() error {
	entries, err := os.ReadDir(e.filesRoot())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, d := range entries {
		if !e.live(d.Name()) {
			if err := os.RemoveAll(e.filesOf(d.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
