package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-serverless/hearth/internal/pki"
)

const (
	// AuthoritySecret holds the authorities and their keys. Nobody but poolmanager has to read it.
	AuthoritySecret = "hearth-ca"
	authorityKeys   = "ca.key"

	// certificatesInterval is between two looks at the Secrets, and so until one that was deleted or damaged is there again.
	certificatesInterval = time.Minute
	certificatesTime     = 30 * time.Second // bounds one look
	// swaps is how often one Secret is tried again when others change it meanwhile.
	swaps = 5
)

// certificateSecrets are those that daemons mount, of type kubernetes.io/tls and with ca.crt, by identity.
var certificateSecrets = map[string]string{
	pki.Nodeagent: "hearth-tls-nodeagent", pki.Poolmanager: "hearth-tls-poolmanager", pki.Gateway: "hearth-tls-gateway", pki.Admin: "hearth-tls-admin",
}

// CertificatesConfig says where certificates are kept. Client and Namespace must be set.
type CertificatesConfig struct {
	// Client must ask the API server and no cache. It gets and updates the Secrets that are named above, and creates them.
	Client    client.Client
	Namespace string
	// Dir is where poolmanager's own certificate is written, as pki.OpenDir reads it: it cannot wait for a Secret to be mounted that it
	// makes itself. Empty is nowhere.
	Dir        string
	Logger     *slog.Logger
	Registerer prometheus.Registerer // may be nil
}

// Certificates keeps the Secrets by which daemons know each other, so that applying manifests is all that there is to do. Any number
// of replicas may do so at once: what is to be changed follows from what is there, and is changed by compare-and-swap.
type Certificates struct {
	config  CertificatesConfig
	log     *slog.Logger
	written pki.Bundle // to Dir
	expires *prometheus.GaugeVec
}

// NewCertificates does nothing yet.
func NewCertificates(c CertificatesConfig) *Certificates {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	expires := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "hearth_certificate_expiry_timestamp_seconds", Help: "When the certificate of an identity expires that is in its Secret.",
	}, []string{"identity"})
	if c.Registerer != nil {
		c.Registerer.MustRegister(expires)
	}
	return &Certificates{config: c, log: c.Logger, expires: expires}
}

// Run keeps the Secrets until ctx is done. What it cannot do it logs, once for as long as it stays the same.
func (c *Certificates) Run(ctx context.Context) error {
	said := ""
	for {
		err := c.Ensure(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			said = ""
		case err.Error() != said:
			said = err.Error()
			c.log.Error("certificates cannot be kept", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(certificatesInterval/2 + rand.N(certificatesInterval)):
		}
	}
}

// Ensure looks once, makes and renews what is to be made and renewed, and writes poolmanager's own certificate to Dir. Of an error it is
// true all the same that Dir has a certificate if there was one that is valid. It must not be called twice at once.
func (c *Certificates) Ensure(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, certificatesTime)
	defer cancel()
	authorities, err := c.authorities(ctx)
	var failed []error
	if err != nil {
		failed = append(failed, err)
	}
	for _, identity := range slices.Sorted(maps.Keys(certificateSecrets)) {
		var b pki.Bundle
		if err == nil {
			var own error
			if b, own = c.renew(ctx, authorities, identity); own != nil {
				failed = append(failed, own)
			}
		} else if s, missing := c.get(ctx, certificateSecrets[identity]); missing == nil {
			b = bundleOf(s)
		}
		if own := c.use(identity, b); own != nil {
			failed = append(failed, own)
		}
	}
	return errors.Join(failed...)
}

// use takes in what an identity's Secret has.
func (c *Certificates) use(identity string, b pki.Bundle) error {
	end, err := b.Expires(time.Now())
	if err != nil {
		return nil //nolint:nilerr // it was told of by who looked for it
	}
	c.expires.WithLabelValues(identity).Set(float64(end.Unix()))
	if identity != pki.Poolmanager || c.config.Dir == "" || c.written.Equal(b) {
		return nil
	}
	if err := pki.WriteDir(c.config.Dir, b); err != nil {
		return err
	}
	c.written = b
	return nil
}

// authorities gives those who sign, which it makes or renews.
func (c *Certificates) authorities(ctx context.Context) (pki.Authorities, error) {
	var out pki.Authorities
	err := c.swap(ctx, AuthoritySecret, func(s *corev1.Secret) (string, error) {
		now := time.Now()
		former, err := pki.ParseAuthorities(s.Data[pki.AuthorityFile], s.Data[authorityKeys])
		if err != nil {
			if depend := c.dependents(ctx, now); depend != "" {
				return "", c.lost(ctx, s, err, depend)
			}
		}
		renewed, why, failed := former.Renew(now)
		if failed != nil {
			return "", failed
		}
		if out = renewed; why == "" {
			return "", nil
		}
		if err != nil && s.ResourceVersion != "" {
			why = "it was damaged, and nothing depends on it: " + err.Error()
		}
		certificates, keys, err := renewed.Encode()
		s.Type = corev1.SecretTypeOpaque
		s.Data = map[string][]byte{pki.AuthorityFile: certificates, authorityKeys: keys}
		return why, err
	})
	return out, err
}

// dependents names Secrets with certificates that are valid: whoever uses them would not know another authority.
func (c *Certificates) dependents(ctx context.Context, now time.Time) string {
	var names []string
	for _, name := range slices.Sorted(maps.Values(certificateSecrets)) {
		s, err := c.get(ctx, name)
		if err != nil && !apierrors.IsNotFound(err) {
			names = append(names, name) // for all that is known
			continue
		}
		if _, err := bundleOf(s).Expires(now); err == nil {
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

// lost says that the authorities are, or that another replica has just made them.
func (c *Certificates) lost(ctx context.Context, s *corev1.Secret, err error, depend string) error {
	if s.ResourceVersion == "" {
		if _, missing := c.get(ctx, AuthoritySecret); missing == nil {
			return errAgain
		}
		err = errors.New("it is gone")
	}
	return fmt.Errorf("secret %s/%s: %w: daemons trust each other by it until their certificates expire; restore it, or begin anew with "+
		"`kubectl -n %s delete secret %s %s`, after which they refuse each other until all have the new ones, within minutes",
		c.config.Namespace, AuthoritySecret, err, c.config.Namespace, AuthoritySecret, depend)
}

// renew gives the bundle of an identity, which it makes or renews.
func (c *Certificates) renew(ctx context.Context, a pki.Authorities, identity string) (out pki.Bundle, err error) {
	err = c.swap(ctx, certificateSecrets[identity], func(s *corev1.Secret) (string, error) {
		renewed, why, err := a.RenewBundle(time.Now(), identity, bundleOf(s))
		if out = renewed; err != nil || why == "" {
			return "", err
		}
		if s.ResourceVersion == "" {
			s.Type = corev1.SecretTypeTLS // it cannot be changed later
		}
		s.Data = map[string][]byte{pki.AuthorityFile: renewed.Authorities, pki.CertificateFile: renewed.Certificate, pki.KeyFile: renewed.Key}
		return why, nil
	})
	return out, err
}

func bundleOf(s *corev1.Secret) pki.Bundle {
	return pki.Bundle{Authorities: s.Data[pki.AuthorityFile], Certificate: s.Data[pki.CertificateFile], Key: s.Data[pki.KeyFile]}
}

// errAgain says that a Secret is to be looked at anew.
var errAgain = errors.New("others change it")

// swap changes a Secret, or makes it, if change says why, unless somebody else has changed it since it was read; then it begins again. One
// that does not exist has no resource version.
func (c *Certificates) swap(ctx context.Context, name string, change func(*corev1.Secret) (why string, err error)) error {
	for range swaps {
		s, err := c.get(ctx, name)
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("secret %s/%s: %w", c.config.Namespace, name, err)
		}
		why, err := change(s)
		if errors.Is(err, errAgain) {
			continue
		}
		if err != nil || why == "" {
			return err
		}
		if s.ResourceVersion == "" {
			err = c.config.Client.Create(ctx, s)
		} else {
			err = c.config.Client.Update(ctx, s)
		}
		switch {
		case err == nil:
			c.log.Info("certificates are made anew", "secret", name, "reason", why)
			return nil
		case !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) && !apierrors.IsNotFound(err):
			return fmt.Errorf("write secret %s/%s: %w", c.config.Namespace, name, err)
		}
	}
	return fmt.Errorf("secret %s/%s: %w", c.config.Namespace, name, errAgain)
}

func (c *Certificates) get(ctx context.Context, name string) (*corev1.Secret, error) {
	s := &corev1.Secret{}
	err := c.config.Client.Get(ctx, client.ObjectKey{Namespace: c.config.Namespace, Name: name}, s)
	if err != nil {
		s = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{
			Namespace: c.config.Namespace, Name: name, Labels: map[string]string{"app.kubernetes.io/name": "hearth"},
		}}
	}
	return s, err
}
