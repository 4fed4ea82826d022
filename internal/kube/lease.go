package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// LeaseName is the Lease that poolmanagers compete for.
	LeaseName = "hearth-poolmanager"
	// epochAnnotation has the number of the last term. It only ever grows, by compare-and-swap, so that no two terms have one number.
	epochAnnotation = "hearth.dev/epoch"
	// leaseTime is how long a leader may be silent before another takes over; renewTime is between its words, and lookTime between a
	// standby's looks. Together with what a new leader needs to hear of all nodes they stay below 5 s. A take-over that was needless
	// costs nothing: nodes refuse the old term.
	leaseTime = 3 * time.Second
	renewTime = 750 * time.Millisecond
	lookTime  = 250 * time.Millisecond
	// leaseCall bounds one request to the API server, so that one that hangs is noticed.
	leaseCall = 2 * time.Second
	// maxEpoch is beyond any number of terms that can have been; the versions of events are made of it.
	maxEpoch = 1 << 30
)

// errRaised ends a term that another has followed.
var errRaised = errors.New("another poolmanager leads")

// Elector makes one of several poolmanagers the leader. It is not client-go's: that one ends a leader that cannot reach the API server,
// and ours has to go on. Nodes keep a leader that was succeeded from doing harm, by its epoch; so all that it needs is to be told.
type Elector struct {
	client    client.Client
	namespace string
	identity  string // unique among the candidates, and over their restarts
	log       *slog.Logger
}

// seen is what a candidate saw of the Lease last, and when by its own clock that had changed: other clocks are not believed.
type seen struct {
	holder  string
	epoch   int64
	version string // of the object; empty if there is none
	since   time.Time
}

// move is what a candidate does next.
type move int

const (
	stay     move = iota
	take          // begin a term, if nobody else does first
	renew         // say that the term goes on
	stepDown      // another term has begun
)

// decide is the whole of the election. term is that of the candidate, and zero for one that does not lead.
func decide(now time.Time, identity string, term int64, s seen) move {
	switch {
	case term > 0 && (s.epoch > term || s.holder != identity && s.holder != ""):
		return stepDown
	case term > 0:
		return renew
	case s.holder == "" || !now.Before(s.since.Add(leaseTime)):
		return take
	}
	return stay
}

// Run waits until it may lead, calls lead with a context that ends with the term, and says why that ended. A process leads once: what it
// knows afterwards is of no use to anybody, and a new one begins with nothing.
func (e *Elector) Run(ctx context.Context, lead func(ctx context.Context, t *Term) error) error {
	var s seen
	for ctx.Err() == nil {
		fresh, err := e.look(ctx)
		if err == nil {
			if fresh.since = time.Now(); fresh.version == s.version && s.version != "" {
				fresh.since = s.since
			}
			s = fresh
			if decide(time.Now(), e.identity, 0, s) == take {
				if err = e.write(ctx, s.version, e.identity, s.epoch+1); err == nil {
					return e.lead(ctx, s.epoch+1, lead)
				}
			}
		}
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) && ctx.Err() == nil {
			e.log.Warn("compete for the lease", "lease", LeaseName, "err", err)
		}
		pause(ctx, lookTime)
	}
	return nil
}

// lead holds the term.
func (e *Elector) lead(ctx context.Context, epoch int64, lead func(context.Context, *Term) error) error {
	e.log.Info("leading", "epoch", epoch)
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan error, 1)
	go func() { ended <- lead(inner, &Term{Epoch: epoch, elector: e}) }()
	ticker := time.NewTicker(renewTime)
	defer ticker.Stop()
	for {
		select {
		case err := <-ended:
			e.release(context.WithoutCancel(ctx), epoch)
			if cause := context.Cause(inner); ctx.Err() == nil && cause != nil {
				return cause
			}
			return err
		case <-ticker.C:
			if inner.Err() != nil {
				continue // until what was begun in the term has ended
			}
			if err := e.renew(ctx, epoch); errors.Is(err, errRaised) {
				cancel(err)
			} else if err != nil && ctx.Err() == nil {
				e.log.Warn("renew the lease; going on", "epoch", epoch, "err", err)
			}
		}
	}
}

// look reads the Lease. One that is not there is one that nobody holds.
func (e *Elector) look(ctx context.Context) (seen, error) {
	l, err := e.get(ctx)
	if err != nil || l == nil {
		return seen{}, err
	}
	return seenIn(l)
}

func (e *Elector) get(ctx context.Context) (*coordinationv1.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseCall)
	defer cancel()
	l := &coordinationv1.Lease{}
	err := e.client.Get(ctx, client.ObjectKey{Namespace: e.namespace, Name: LeaseName}, l)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read lease %s: %w", LeaseName, err)
	}
	return l, nil
}

func seenIn(l *coordinationv1.Lease) (seen, error) {
	s := seen{version: l.ResourceVersion}
	if l.Spec.HolderIdentity != nil {
		s.holder = *l.Spec.HolderIdentity
	}
	if text := l.Annotations[epochAnnotation]; text != "" {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 || n > maxEpoch {
			return seen{}, fmt.Errorf("lease %s: annotation %s is %.40q and no term's number; delete the lease", LeaseName, epochAnnotation, text)
		}
		s.epoch = n
	}
	return s, nil
}

// write is the compare-and-swap: it fails with Conflict or AlreadyExists if the Lease is not the version that was seen.
func (e *Elector) write(ctx context.Context, version, holder string, epoch int64) error {
	ctx, cancel := context.WithTimeout(ctx, leaseCall)
	defer cancel()
	now, seconds := metav1.NewMicroTime(time.Now()), int32(leaseTime/time.Second)
	l := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: e.namespace, Name: LeaseName, ResourceVersion: version,
			Annotations: map[string]string{epochAnnotation: strconv.FormatInt(epoch, 10)}},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder, LeaseDurationSeconds: &seconds, RenewTime: &now},
	}
	if version == "" {
		return e.client.Create(ctx, l)
	}
	return e.client.Update(ctx, l)
}

// renew says that a term goes on. It fails with errRaised if another has begun.
func (e *Elector) renew(ctx context.Context, epoch int64) error {
	s, err := e.look(ctx)
	if err != nil {
		return err
	}
	if decide(time.Now(), e.identity, epoch, s) == stepDown {
		return fmt.Errorf("%w: %s, in term %d", errRaised, s.holder, s.epoch)
	}
	return e.write(ctx, s.version, e.identity, epoch)
}

// release lets another begin at once, if this term is still the last.
func (e *Elector) release(ctx context.Context, epoch int64) {
	s, err := e.look(ctx)
	if err != nil || s.holder != e.identity || s.epoch != epoch {
		return
	}
	if err := e.write(ctx, s.version, "", epoch); err != nil {
		e.log.Warn("release the lease", "epoch", epoch, "err", err)
	}
}

// Term is one time of leading.
type Term struct {
	Epoch   int64
	elector *Elector
}

// raise has the next term be later than one that a node has seen: the Lease was lost, or made anew.
func (t *Term) raise(ctx context.Context, after int64) error {
	if after < 0 || after > maxEpoch {
		return fmt.Errorf("a node has seen term %d, which no poolmanager can have had", after)
	}
	s, err := t.elector.look(ctx)
	if err != nil || s.epoch >= after {
		return err
	}
	return t.elector.write(ctx, s.version, "", after) // this term is over
}

// pause waits, or until ctx is done.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
