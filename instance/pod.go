package instance

import (
	"fmt"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// Ports of the Functions that share a pod: below those that the kernel takes for outgoing connections. A pod gives out each once:
// what was one Function's address is never another's, however late somebody hears that the first has gone.
const (
	firstPort = 20000
	maxSlots  = 10000
	// slotsAhead are left out after a restart, for Instances that ended without a record.
	slotsAhead = 100
)

// pod is a sandbox and who is in it: one Instance, or the workers of one group's Functions, which have the sandbox's network, its
// System V IPC and its host name in common, and processes, files, cgroup and log each for itself.
type pod struct {
	id string // of the Instance that it was made for, which may go before it

	mu      sync.Mutex // guards what follows; taken after an instance's mu
	owner   owner
	members map[string]struct{} // Instances, by id
	slots   int                 // given out so far
	box     sandbox             // once it is Warm
}

// owner is whose a pod is. The zero value is nobody's yet.
type owner struct {
	tenant, group string
	alone         string // the one Instance that it is for, if it is no group's
}

// member is where an Instance is.
type member struct{ pod, id string }

func newPod(id string) *pod { return &pod{id: id, members: map[string]struct{}{}} }

// ownerOf is who a pod belongs to once a Revision is in an Instance of it.
func ownerOf(r *hearthv1.Revision, id string) owner {
	if r.GetGroup() == "" {
		return owner{alone: id}
	}
	return owner{tenant: r.GetTenant(), group: r.GetGroup()}
}

// String says it in an error.
func (o owner) String() string {
	switch {
	case o == (owner{}):
		return "nobody's"
	case o.group == "":
		return "instance " + o.alone + "'s alone"
	}
	return fmt.Sprintf("group %q's of tenant %q", o.group, o.tenant)
}

// admit makes the pod o's, unless it is somebody else's.
func (p *pod) admit(o owner) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.admitLocked(o)
}

func (p *pod) admitLocked(o owner) error {
	if p.owner != (owner{}) && p.owner != o {
		return fmt.Errorf("pod %s is %s, not %s: %w", p.id, p.owner, o, errdefs.ErrFailedPrecondition)
	}
	p.owner = o
	return nil
}

// join takes in a worker of a group and returns the place that it gets. A pod that nobody is in any more takes none.
func (p *pod) join(id string, o owner) (slot int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case len(p.members) == 0 || p.box.ID == "":
		return 0, fmt.Errorf("pod %s is not there to take %s: %w", p.id, id, errdefs.ErrFailedPrecondition)
	case p.slots >= maxSlots:
		return 0, fmt.Errorf("pod %s has had %d instances, and takes no more: %w", p.id, p.slots, errdefs.ErrFailedPrecondition)
	}
	if err := p.admitLocked(o); err != nil {
		return 0, err
	}
	p.members[id] = struct{}{}
	p.slots++
	return p.slots - 1, nil
}

// restore takes in an Instance that a former engine had in the pod. One that cannot have been there is in it all the same, until it
// is discarded.
func (p *pod) restore(id string, slot int, o owner) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.members[id] = struct{}{}
	p.slots = max(p.slots, slot+1+slotsAhead)
	if o == (owner{}) {
		return nil
	}
	return p.admitLocked(o)
}

// leave takes an Instance out, and says whether nobody is left, so that the sandbox has to go. It may be called again.
func (p *pod) leave(id string) (last bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.members, id)
	return len(p.members) == 0
}

// made says which sandbox it is.
func (p *pod) made(box sandbox) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.box = box
}

func (p *pod) sandbox() sandbox {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.box
}

func (p *pod) whose() owner {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.owner
}

// place is where an Instance is.
func (i *instance) place() member { return member{i.pod.id, i.id} }

// worker tells whether an Instance was made in another's pod.
func (i *instance) worker() bool { return i.pod.id != i.id }

// placed is a Revision with the port that an Instance's place gives it, if it is one that shares its pod.
func (i *instance) placed(r *hearthv1.Revision) *hearthv1.Revision {
	if r.GetGroup() == "" {
		return r
	}
	r = proto.CloneOf(r)
	r.Port = int32(firstPort + i.slot)
	return r
}

// placeLabels are what a restarted engine has to know of an Instance's place.
func (e *Engine) placeLabels(i *instance, to map[string]string) map[string]string {
	if path := e.cgroups.learnt.of(i.pod.id); path != "" {
		to[labelCgroup] = path
	}
	if i.worker() {
		to[labelPod], to[labelSlot] = i.pod.id, strconv.Itoa(i.slot)
	}
	if o := i.pod.whose(); o.group != "" {
		to[labelGroup] = o.group
		if o.tenant != "" {
			to[labelTenant] = o.tenant
		}
	}
	return to
}

// podOf names the pod that a container with these labels is in.
func podOf(labels map[string]string) string {
	if id := labels[labelPod]; id != "" {
		return id
	}
	return labels[labelInstance]
}

// enter makes a new Instance known, in a pod of its own or in the one that it is made for.
func (e *Engine) enter(id, in string, o owner) (i *instance, known bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i, known := e.instances[id]; known {
		return i, true, nil
	}
	p, slot := newPod(id), 0
	switch _, taken := e.pods[id]; {
	case taken:
		return nil, false, fmt.Errorf("instance %s has gone, and its pod is still others': %w", id, errdefs.ErrFailedPrecondition)
	case in == "":
		p.members[id], p.slots = struct{}{}, 1
		e.pods[id] = p
	default:
		var there bool
		if p, there = e.pods[in]; !there {
			return nil, false, fmt.Errorf("pod %s is not there to take %s: %w", in, id, errdefs.ErrFailedPrecondition)
		}
		if slot, err = p.join(id, o); err != nil {
			return nil, false, err
		}
	}
	i = newInstance(id, p)
	i.slot = slot
	e.instances[id] = i
	return i, false, nil
}

// drop forgets an Instance of which nothing is left, and its pod if it was the last there.
func (e *Engine) drop(i *instance) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.instances, i.id)
	for _, other := range e.instances {
		if other.pod == i.pod {
			return
		}
	}
	delete(e.pods, i.pod.id)
}

// hasPod tells whether a pod is known, whether or not the Instance that it was made for is there.
func (e *Engine) hasPod(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ok := e.pods[id]
	return ok
}

// podThere finds a pod, or makes what is known of it.
func (e *Engine) podThere(id string) *pod {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.pods[id]
	if p == nil {
		p = newPod(id)
		e.pods[id] = p
	}
	return p
}
