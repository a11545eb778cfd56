import java.net.URI;
import java.time.Instant;
import java.util.HashSet;
import java.util.Set;
import org.springframework.http.client.JdkClientHttpRequestFactory;
import org.springframework.vault.authentication.AppRoleAuthentication;
import org.springframework.vault.authentication.AppRoleAuthenticationOptions;
import org.springframework.vault.authentication.AppRoleAuthenticationOptions.RoleId;
import org.springframework.vault.authentication.AppRoleAuthenticationOptions.SecretId;
import org.springframework.vault.client.VaultClients;
import org.springframework.vault.client.VaultEndpoint;
import org.springframework.vault.core.VaultTemplate;
import org.springframework.vault.core.VaultTransitOperations;

/**
 * Calls the service by Sessions of docs/integrations/rust-node-java.md until three tokens of logins were used.
 *
 * <p>Argument: the mount of a login with short tokens. Ends with 1 at the first call that is refused, or after a minute.
 */
public final class SessionCalls {
  private static final int TOKENS = 3;
  private static final int LIMIT_S = 60;
  private static final int PAUSE_MS = 100;

  private SessionCalls() {}

  public static void main(String[] args) throws InterruptedException {
    VaultEndpoint endpoint = VaultEndpoint.from(URI.create(System.getenv("VAULT_ADDR")));
    JdkClientHttpRequestFactory http = new JdkClientHttpRequestFactory();
    AppRoleAuthenticationOptions login =
        AppRoleAuthenticationOptions.builder()
            .path(args[0])
            .roleId(RoleId.provided(System.getenv("VAULT_ROLE_ID")))
            .secretId(SecretId.provided(System.getenv("VAULT_SECRET_ID")))
            .build();
    Sessions sessions =
        new Sessions(new AppRoleAuthentication(login, VaultClients.createRestTemplate(endpoint, http)));
    VaultTransitOperations transit = new VaultTemplate(endpoint, http, sessions).opsForTransit();

    Set<String> tokens = new HashSet<>();
    Instant end = Instant.now().plusSeconds(LIMIT_S);
    while (tokens.size() < TOKENS && Instant.now().isBefore(end)) {
      transit.encrypt("default", "secret-data");
      tokens.add(sessions.getSessionToken().getToken());
      Thread.sleep(PAUSE_MS);
    }
    System.out.println(tokens.size());
  }
}
